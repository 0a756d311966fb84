"""Surgery: removes the heads and neurons, or the blocks, of a plan.  No other module changes the shape of weights.

Removing heads and neurons equals masking: the pruned model computes the same as the dense one with the removed parts
set to zero.  Removing blocks equals bypassing: the pruned model computes the same as the dense one in which the
output of those blocks is their input.
Order of this file: remove · blocks · heads and neurons.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models import (
    described_networks,
    expert_surgery,
    families,
    growth,
    offload,
    possible_cuts,
    renumbering,
    verification,
)
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.cutting import cut_block, refresh, state
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.models.families import LanguageFamily
from pruning_lib.models.plan import Plan


def remove(model: nn.Module, plan: Plan | BlockPlan | ExpertPlan, *, inplace: bool = False) -> nn.Module:
    """Return the model without the heads and neurons, blocks, or experts of ``plan``; its weights are smaller.

    The kept blocks are renumbered, so the pruned model needs a new plan.

    Parameters
    ----------
    model : the model the plan was made for
    inplace : cut ``model`` itself instead of a copy (halves the memory needed); a model whose weights are offloaded
        to disk or host memory (``load_model(..., device="auto")``) is only cut in place, and stays offloaded

    Raises
    ------
    ValueError
        before the model is changed: when the plan was made for a model of other sizes or with other blocks, or
        ``inplace`` is False for an offloaded model.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> prompts = pl.batches(["The sea is", "Once upon a time"], tokenizer)
    >>> plan = pl.choose(pl.importance(model, prompts), model, removed_fraction=0.2)
    >>> smaller = pl.remove(model, plan)
    >>> smaller.num_parameters() == model.num_parameters() - plan.removed_parameters
    True
    """
    if not inplace and offload.is_offloaded(model):
        raise ValueError("weights of this model are offloaded to disk or host memory, a copy would need all of them; "
                         "give inplace=True")
    if isinstance(plan, ExpertPlan):
        return expert_surgery.remove(model, plan, inplace=inplace)
    if isinstance(plan, BlockPlan):
        return _remove_blocks(model, plan, inplace)
    return _remove_heads_and_neurons(model, plan, inplace)


def _remove_blocks(model: nn.Module, plan: BlockPlan, inplace: bool) -> nn.Module:
    if tuple(families.residual_blocks(model)) != plan.blocks:
        raise ValueError("the plan was made for a model with other blocks (or this model is pruned already); "
                         "make a new plan for this model: blocks are renumbered when one before them is removed")
    if families.is_image_network(model) and not families.image_family(model):
        pruned = model if inplace else copy.deepcopy(model)
        described_networks.remove(pruned, plan.removed)  # names stay as they are
        return pruned
    stays = [block.name not in plan.removed for block in plan.blocks]
    family = None if families.image_family(model) else families.family_of(model)
    values = renumbering.new_fields(model, family.blocks, stays, known=not family.found) if family else {}
    pruned = model if inplace else families.copy_of(model)
    for name in sorted(plan.removed, key=_place, reverse=True):  # from the back: the blocks in front keep their names
        path, number = _place(name)
        del cast(nn.ModuleList, pruned.get_submodule(path))[number]
    if family is None:
        _state_blocks(pruned, plan)
    else:
        families.keep_blocks(pruned, stays)
        renumbering.renumber(pruned, family.blocks, stays, values)
    return pruned


def _place(name: str) -> tuple[str, int]:
    """Return the path of the sequence that holds a block, and the number of the block in it."""
    path, _, number = name.rpartition(".")
    return path, int(number)


def _state_blocks(network: Any, plan: BlockPlan) -> None:
    """Write the names of the kept blocks into the config of an image network, if it has one."""
    config: Any = getattr(network, "config", None)
    if hasattr(config, "kept_blocks"):
        pairs = zip(config.kept_blocks, plan.blocks, strict=True)
        kept = tuple(original for original, block in pairs if block.name not in plan.removed)
        network.config = replace(config, kept_blocks=kept)


def _remove_heads_and_neurons(model: nn.Module, plan: Plan, inplace: bool) -> nn.Module:
    if families.sizes(model) != plan.sizes:
        raise ValueError("the plan was made for a model of other sizes (or this model is pruned already); "
                         "choose a new plan for this model")
    families.refuse_head_count(model, plan.kept["heads"])
    if plan.removed_heads.numel():
        possible_cuts.refuse_cut(model, plan.grouped_query)
    family = families.family_of(model)
    reference = _reference(model, family, plan)
    pruned = model if inplace else families.copy_of(model)
    s = plan.sizes
    counts = {"heads": s.heads, "groups": s.groups, "neurons": s.neurons}
    for i, block in enumerate(families.blocks(pruned)):
        kept = _kept_units(plan, i)
        parts = families.block_parts(block, family.of_block(i), families.head_width(model, i))
        cut_block(block, parts, counts, kept)
        if reference is None:
            _refresh(block.get_submodule(family.attention), plan.kept["heads"], plan.kept["groups"])
    if reference is None:
        _state_sizes(pruned.config, plan)
    else:
        refresh(pruned, reference)
        state(families.text_config(pruned), verification.values_of(pruned, family, plan.kept))
    return pruned


def _reference(model: nn.Module, family: LanguageFamily, plan: Plan) -> nn.Module | None:
    """Return the network transformers builds for the remaining sizes, for a family that was found; None with a record.

    Raises
    ------
    ValueError
        when it builds none, or the weights are not available, so that the layout of its matrices could not be tried.
    """
    if not family.found:
        return None
    if not family.verified:
        raise ValueError("the weights of this model are not available, and its type has no record: the order of rows "
                         "in its matrices cannot be tried. Load it on one device (device='cpu'), or add a record")
    return growth.rebuilt(model, verification.values_of(model, family, plan.kept))


def _kept_units(plan: Plan, number: int) -> dict[str, Tensor]:
    """Return the places of heads, groups and neurons that stay in one block; nothing for units it does not have."""
    s = plan.sizes
    kept: dict[str, Tensor] = {}
    if number in s.head_blocks:
        at = s.head_blocks.index(number)
        kept |= {"heads": _kept(plan.removed_heads[at], s.heads), "groups": _kept(plan.removed_groups[at], s.groups)}
    if number in s.neuron_blocks:
        kept["neurons"] = _kept(plan.neurons[s.neuron_blocks.index(number)], s.neurons)
    return kept


def _kept(removed: Tensor, places: int) -> Tensor:
    """Return the kept places in ascending order."""
    stays = torch.ones(places, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()


def _refresh(attention: nn.Module, heads: int, groups: int) -> None:
    """Set the head counts of an attention module; the set of counts depends on the transformers version."""
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": groups,
              "num_key_value_groups": heads // groups}
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)


def _state_sizes(config: Any, plan: Plan) -> None:
    """Write the new sizes into the config, always with ``head_dim``, which is otherwise derived from the head count."""
    config.num_attention_heads = plan.kept["heads"]
    config.num_key_value_heads = plan.kept["groups"]
    config.intermediate_size = plan.kept["neurons"]
    config.head_dim = plan.sizes.head_width
