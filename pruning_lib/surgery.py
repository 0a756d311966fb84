"""Carries a plan out: takes heads and neurons out of a language model.  Nothing else cuts.

Removing equals masking: the pruned model computes what the dense one computes with the removed parts set to zero.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pruning_lib import families
from pruning_lib.families import LanguageFamily
from pruning_lib.plans import Plan


def remove(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """The model without the heads and neurons of ``plan``; smaller in fact, and runnable at once.

    Parameters
    ----------
    model : the model the plan was made for
    inplace : cut ``model`` itself instead of a copy (halves the memory needed)

    Raises
    ------
    ValueError
        before anything is cut, when the plan was made for a model of other sizes.
    """
    if families.sizes(model) != plan.sizes:
        raise ValueError("the plan was made for a model of other sizes (or this model is pruned already); "
                         "choose a new plan for this model")
    families.refuse_head_count(model, plan.kept["heads"])
    pruned = model if inplace else copy.deepcopy(model)
    family, D, s = families.of(pruned), plan.sizes.head_width, plan.sizes
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
    _keep_outputs(block.get_submodule(family.queries), queries)
    _keep_outputs(block.get_submodule(family.keys), pairs)
    _keep_outputs(block.get_submodule(family.values), pairs)
    _keep_inputs(block.get_submodule(family.heads_out), queries)
    for path in family.neurons_in:
        _keep_outputs(block.get_submodule(path), neurons)
    _keep_inputs(block.get_submodule(family.neurons_out), neurons)


def _keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = _sliced(linear.weight, rows, dim=0)
    if linear.bias is not None:
        linear.bias = _sliced(linear.bias, rows, dim=0)
    linear.out_features = len(rows)


def _keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = _sliced(linear.weight, columns, dim=1)
    linear.in_features = len(columns)


def _sliced(parameter: nn.Parameter, keep: Tensor, dim: int) -> nn.Parameter:
    data = parameter.detach().index_select(dim, keep.to(parameter.device))
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


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


def _state_sizes(config: object, plan: Plan) -> None:
    """Write the new sizes into the config; ``head_dim`` always, since absent it would be recomputed from the heads."""
    config.num_attention_heads = plan.kept["heads"]
    config.num_key_value_heads = plan.kept["groups"]
    config.intermediate_size = plan.kept["neurons"]
    config.head_dim = plan.sizes.head_width
