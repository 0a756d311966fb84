"""Carries a plan out: takes heads and neurons, or whole blocks, out of a network.  Nothing else cuts.

Removing heads and neurons equals masking: the pruned model computes what the dense one computes with the removed parts
set to zero.  Removing blocks equals bypassing: it computes what the dense one computes when those blocks hand on their
input.  Order of this file: remove · blocks · heads and neurons.
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
    """The model without what ``plan`` names; smaller in fact, and runnable at once.

    Blocks that stay are renumbered, so a new plan has to be made for the pruned model.

    Parameters
    ----------
    model : the model the plan was made for
    inplace : cut ``model`` itself instead of a copy (halves the memory needed); a model whose weights wait on disk or
        in host memory (``models.load(..., device="auto")``) is only cut in place, and its weights stay where they are

    Raises
    ------
    ValueError
        before anything is cut, when the plan was made for a model of other sizes or with other blocks, or a copy is
        wanted of a model whose weights wait elsewhere.
    """
    if not inplace and offload.is_offloaded(model):
        raise ValueError("weights of this model wait on disk or in host memory, a copy would need all of them; "
                         "give inplace=True")
    if isinstance(plan, BlockPlan):
        return _remove_blocks(model, plan, inplace)
    return _remove_heads_and_neurons(model, plan, inplace)


def _remove_blocks(model: nn.Module, plan: BlockPlan, inplace: bool) -> nn.Module:
    if tuple(families.residual_blocks(model)) != plan.blocks:
        raise ValueError("the plan was made for a model with other blocks (or this model is pruned already); "
                         "make a new plan for this model: names move up when a block before them goes")
    pruned = model if inplace else copy.deepcopy(model)
    for name in sorted(plan.removed, key=_place, reverse=True):  # from the back: what stays in front keeps its name
        path, number = _place(name)
        del cast(nn.ModuleList, pruned.get_submodule(path))[number]
    if families.image_family(pruned):
        _state_blocks(pruned, plan)
    else:
        _renumber(pruned, plan)
    return pruned


def _place(name: str) -> tuple[str, int]:
    """Path of the sequence that holds a block, and the block's number in it."""
    path, _, number = name.rpartition(".")
    return path, int(number)


def _state_blocks(network: Any, plan: BlockPlan) -> None:
    """Write into an image network's config, where it has one, which of the original blocks it still has."""
    config: Any = getattr(network, "config", None)
    if hasattr(config, "kept_blocks"):
        pairs = zip(config.kept_blocks, plan.blocks, strict=True)
        kept = tuple(original for original, block in pairs if block.name not in plan.removed)
        network.config = replace(config, kept_blocks=kept)


def _renumber(model: Any, plan: BlockPlan) -> None:
    """Say in a language model's modules and config how many blocks there are now, and which is which.

    Attention finds its place in the key/value cache by ``layer_idx``; what the config lists per block (``layer_types``:
    which blocks see a sliding window) is read by place.
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
    """The places that stay, ascending."""
    stays = torch.ones(places, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()


def _wide(heads: Tensor, D: int) -> Tensor:
    """Rows of the projections that belong to these heads."""
    return (heads[:, None] * D + torch.arange(D)).flatten()


def _refresh(attention: nn.Module, heads: int, groups: int) -> None:
    """Attention modules keep counts of their own; which ones depends on the transformers version."""
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": groups,
              "num_key_value_groups": heads // groups}
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)


def _state_sizes(config: Any, plan: Plan) -> None:
    """Write the new sizes into the config; ``head_dim`` always, since absent it would be recomputed from the heads."""
    config.num_attention_heads = plan.kept["heads"]
    config.num_key_value_heads = plan.kept["groups"]
    config.intermediate_size = plan.kept["neurons"]
    config.head_dim = plan.sizes.head_width
