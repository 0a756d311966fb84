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

from pruning_lib.models import families, offload
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.families import LanguageFamily
from pruning_lib.models.plan import Plan


def remove(model: nn.Module, plan: Plan | BlockPlan, *, inplace: bool = False) -> nn.Module:
    """Return the model without the heads and neurons, or blocks, of ``plan``; its weights are smaller.

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
    """
    if not inplace and offload.is_offloaded(model):
        raise ValueError("weights of this model are offloaded to disk or host memory, a copy would need all of them; "
                         "give inplace=True")
    if isinstance(plan, BlockPlan):
        return _remove_blocks(model, plan, inplace)
    return _remove_heads_and_neurons(model, plan, inplace)


def _remove_blocks(model: nn.Module, plan: BlockPlan, inplace: bool) -> nn.Module:
    if tuple(families.residual_blocks(model)) != plan.blocks:
        raise ValueError("the plan was made for a model with other blocks (or this model is pruned already); "
                         "make a new plan for this model: blocks are renumbered when one before them is removed")
    pruned = model if inplace else copy.deepcopy(model)
    for name in sorted(plan.removed, key=_place, reverse=True):  # from the back: the blocks in front keep their names
        path, number = _place(name)
        del cast(nn.ModuleList, pruned.get_submodule(path))[number]
    if families.image_family(pruned):
        _state_blocks(pruned, plan)
    else:
        _renumber(pruned, plan)
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


def _renumber(model: Any, plan: BlockPlan) -> None:
    """Write the new number of blocks and the new block numbers into the modules and config of a language model.

    ``layer_idx`` is the place of an attention module in the key/value cache; lists in the config with one entry per
    block (``layer_types``: full attention or sliding window) are indexed by block number.
    """
    for i, block in enumerate(families.blocks(model)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = i
    stays = [block.name not in plan.removed for block in plan.blocks]
    for name, value in list(vars(model.config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == len(stays):
            setattr(model.config, name, [v for v, kept in zip(value, stays, strict=True) if kept])
    model.config.num_hidden_layers = sum(stays)


def _remove_heads_and_neurons(model: nn.Module, plan: Plan, inplace: bool) -> nn.Module:
    if families.sizes(model) != plan.sizes:
        raise ValueError("the plan was made for a model of other sizes (or this model is pruned already); "
                         "choose a new plan for this model")
    families.refuse_head_count(model, plan.kept["heads"])
    pruned = model if inplace else copy.deepcopy(model)
    family, D, s = families.family_of(pruned), plan.sizes.head_width, plan.sizes
    for i, block in enumerate(families.blocks(pruned)):
        queries = _wide(_kept(plan.removed_heads[i], s.heads), D)
        pairs = _wide(_kept(plan.removed_groups[i], s.groups), D)
        neurons = _kept(plan.neurons[i], s.neurons)
        _remove_from_block(block, family, queries, pairs, neurons)
        _refresh(block.get_submodule(family.attention), plan.kept["heads"], plan.kept["groups"])
    _state_sizes(pruned.config, plan)
    return pruned


def _remove_from_block(block: nn.Module, family: LanguageFamily, queries: Tensor, pairs: Tensor, neurons: Tensor
                       ) -> None:
    """Keep the given rows and columns of every projection of one block."""
    p = families.projections(block, family)
    kept: dict[nn.Linear, list[Tensor]] = {}  # a fused matrix keeps rows of several projections
    for part, places in ((p.queries, queries), (p.keys, pairs), (p.values, pairs),
                         *((rows, neurons) for rows in p.neurons_in)):
        kept.setdefault(part.linear, []).append(part.start + places)
    for linear, rows in kept.items():
        _keep_outputs(linear, torch.cat(rows))
    _keep_inputs(p.heads_out, queries)
    _keep_inputs(p.neurons_out, neurons)


def _keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    _slice(linear, "weight", rows, dim=0)
    if linear.bias is not None:
        _slice(linear, "bias", rows, dim=0)
    linear.out_features = len(rows)


def _keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    _slice(linear, "weight", columns, dim=1)
    linear.in_features = len(columns)


def _slice(linear: nn.Linear, name: str, keep: Tensor, dim: int) -> None:
    if offload.is_offloaded(linear):
        offload.slice_offloaded(linear, name, keep, dim)
        return
    parameter = getattr(linear, name)
    data = parameter.detach().index_select(dim, keep.to(parameter.device))
    setattr(linear, name, nn.Parameter(data, requires_grad=parameter.requires_grad))


def _kept(removed: Tensor, places: int) -> Tensor:
    """Return the kept places in ascending order."""
    stays = torch.ones(places, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()


def _wide(heads: Tensor, D: int) -> Tensor:
    """Return the rows of the projections that belong to these heads."""
    return (heads[:, None] * D + torch.arange(D)).flatten()


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
