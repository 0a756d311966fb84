"""Takes whole experts, and neurons out of experts, of a mixture-of-experts model; tries first that this is exact.

transformers keeps all experts of a block in tensors with one slice per expert.
Order of this file: sizes · remove · one block · trials.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models import families, growth, offload, structure, verification
from pruning_lib.models.cutting import cut_block, refresh, replace_tensor, slice_tensor, state, zero
from pruning_lib.models.expert_plan import ExpertPlan, ExpertSizes
from pruning_lib.models.families import Experts, Part
from pruning_lib.models.growth import Unplaced
from pruning_lib.models.parts import tensor

CHOSEN = re.compile("experts_per_tok|moe_topk|moe_k$|top_k_experts|experts_per_token")  # experts a token goes to


def sizes(model: nn.Module) -> ExpertSizes:
    """Return the sizes of the experts of ``model``.

    Raises
    ------
    ValueError
        when it has none, or none that could be placed, with the reason.
    """
    experts = placed(model)
    blocks = families.blocks(model)
    block = blocks[experts.blocks[0]]
    E = tensor(block, experts.down).shape[0]
    [down] = [part for part in experts.neurons if part.parameter == experts.down]
    M = tensor(block, experts.down).shape[down.axis]
    plain = tuple(_plain_count(blocks[i], parts) for i, parts in enumerate(experts.plain))
    return ExpertSizes(
        experts.blocks, E, M, plain, sum(tensor(block, part.parameter).numel() // E for part in experts.experts
                                         if isinstance(tensor(block, part.parameter), nn.Parameter)),
        sum(_per_unit(block, part) // E for part in experts.neurons),
        tuple(sum(_per_unit(blocks[i], part) for part in plain_parts(parts)) for i, parts in enumerate(experts.plain)),
        families.parameter_count(model))


def placed(model: nn.Module) -> Experts:
    """Return where the experts are; ValueError with the reason when there are none that could be placed."""
    family = families.family_of(model)
    if family.experts is None:
        raise ValueError(f"this model has no experts that can be cut: {family.refused.get('experts', 'it has none')}")
    return family.experts


def _per_unit(block: nn.Module, part: Part) -> int:
    shape = tensor(block, part.parameter).shape
    return shape.numel() // shape[part.axis] * part.entries


def plain_parts(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return the parts of an ordinary MLP per neuron of its own, not per neuron of an expert."""
    per = min((part.entries for part in parts), default=1)
    return tuple(replace(part, entries=part.entries // per, pieces=1 if part.entries == per else part.pieces)
                 for part in parts)


def plain_output(block: nn.Module, parts: tuple[Part, ...]) -> str:
    """Return the path of the output projection of an ordinary MLP."""
    paths = [part.parameter.removesuffix(".weight") for part in parts if part.parameter.endswith(".weight")
             and growth.input_axis(block.get_submodule(part.parameter.removesuffix(".weight"))) == part.axis]
    if len(paths) != 1:
        raise Unplaced(f"an MLP beside the experts has {len(paths)} output projections")
    return paths[0]


def _plain_count(block: nn.Module, parts: tuple[Part, ...]) -> int:
    if not parts:
        return 0
    path = plain_output(block, parts)
    return tensor(block, f"{path}.weight").shape[growth.input_axis(block.get_submodule(path))]


def remove(model: nn.Module, plan: ExpertPlan, *, inplace: bool = False) -> nn.Module:
    """Return the model without the experts, and without the neurons of experts, that ``plan`` names.

    The router loses the rows of the removed experts, so their tokens are sent to the others: the model computes the
    same as with the router scores of the removed experts at minus infinity and the removed neurons at zero.

    Raises
    ------
    ValueError
        before anything is cut: for a plan of another model, for a count that could not be stored, and when a trial on
        two tokens shows that removing differs from masking.
    """
    if sizes(model) != plan.sizes:
        raise ValueError("the plan was made for a model of other sizes (or this model is pruned already)")
    if offload.is_offloaded(model):
        raise ValueError("weights of this model wait on disk or in host memory; load it on one device to cut experts")
    experts = tried(model, experts_too=bool(plan.experts.shape[1]))
    refuse_counts(model, plan.kept["experts"], plan.kept["neurons"])
    reference = growth.rebuilt(model, _values(experts, plan.kept))
    pruned = model if inplace else families.copy_of(model)
    for i, block in enumerate(families.blocks(pruned)):
        place = experts.blocks.index(i) if i in experts.blocks else None
        gone = None if place is None else (plan.experts[place], plan.neurons[place])
        _cut(block, experts, i, gone, plan.plain[i])
    refresh(pruned, reference)
    state(families.text_config(pruned), _values(experts, plan.kept))
    return pruned


def row_multiple(model: nn.Module) -> int:
    """Return the number that the neurons of an expert must be a multiple of: torch multiplies rows of 16 bytes."""
    return max(1, 16 // next(model.parameters()).element_size())


def refuse_counts(model: nn.Module, kept: int, neurons: int) -> None:
    """Raise ValueError for so many experts, or neurons of each, as transformers could not run.

    Too few experts for the router, experts that it picks group by group, or rows that torch cannot multiply.
    """
    if neurons % row_multiple(model) and neurons != sizes(model).neurons:
        raise ValueError(f"{neurons} neurons would stay in every expert; transformers multiplies all experts at once "
                         f"in rows of 16 bytes, so their number has to be a multiple of {row_multiple(model)} in this "
                         f"dtype")
    config, E = families.text_config(model).to_dict(), sizes(model).experts
    chosen = max((v for k, v in config.items() if CHOSEN.search(k) and type(v) is int), default=1)
    if kept < chosen:
        raise ValueError(f"{kept} experts would stay, every token goes to {chosen}; keep at least {chosen} of {E}")
    if kept != E and (config.get("n_group") or 1) > 1:
        raise ValueError(f"the router picks experts within {config['n_group']} groups of equal size; whole experts of "
                         f"this model cannot go, neurons inside them can")


def _values(experts: Experts, kept: Mapping[str, int]) -> dict[str, int]:
    return {name: kept[unit] for unit, names in experts.fields.items() for name in names}


def _cut(block: nn.Module, experts: Experts, number: int, gone: tuple[Tensor, Tensor] | None, plain: Tensor) -> None:
    """Cut one block: neurons of every expert, whole experts, neurons of the ordinary MLP."""
    parts = experts.plain[number]
    if parts and len(plain):
        own = plain_parts(parts)
        count = _plain_count(block, parts)
        cut_block(block, own, {"plain": count}, {"plain": _others(count, plain)})
    if gone is None:
        return
    removed, neurons = gone
    if neurons.shape[-1]:
        for part in experts.neurons:
            _cut_inside(block, part, neurons)
    stays = _others(len(neurons), removed)
    for part in experts.experts if len(removed) else ():
        owner, _, name = part.parameter.rpartition(".")
        slice_tensor(block.get_submodule(owner), name, stays, part.axis)


def _cut_inside(block: nn.Module, part: Part, neurons: Tensor) -> None:
    """Take other neurons out of every expert; ``neurons`` (E, m)."""
    old = tensor(block, part.parameter).detach()
    places = part.places(old.shape[part.axis] // part.entries)
    kept = [places[_others(len(places), gone)].flatten().sort().values.to(old.device) for gone in neurons]
    slices = [old[e].index_select(part.axis - 1, entries) for e, entries in enumerate(kept)]
    owner, _, name = part.parameter.rpartition(".")
    replace_tensor(block.get_submodule(owner), name, torch.stack(slices))


def _others(count: int, gone: Tensor) -> Tensor:
    stays = torch.ones(count, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def tried(model: nn.Module, *, experts_too: bool) -> Experts:
    """Return where the experts are, in the layout with which removing equals masking on two tokens.

    Raises
    ------
    Unplaced
        when no layout does.
    """
    experts, problem = placed(model), Unplaced("no layout")
    with _evaluation(model):
        for neurons in structure.layouts(experts.neurons, "neurons"):
            for fused in (False, True):
                option = replace(experts, neurons=neurons, plain=tuple(_fused(parts, fused) for parts in experts.plain))
                try:
                    for i in dict.fromkeys((experts.blocks[0], *(i for i, parts in enumerate(experts.plain) if parts))):
                        _try(model, option, i, whole=False)
                    if experts_too:
                        _try(model, option, experts.blocks[0], whole=True)
                    return option
                except Unplaced as error:
                    problem = error if str(problem) == "no layout" else problem
    raise problem


def _fused(parts: tuple[Part, ...], apart: bool) -> tuple[Part, ...]:
    return tuple(replace(part, pieces=2) if apart and part.entries > min(p.entries for p in parts) else part
                 for part in parts)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _try(model: nn.Module, experts: Experts, number: int, *, whole: bool) -> None:
    """Compare one block masked with the same block cut: neurons inside experts, or one whole expert."""
    s, block = sizes(model), families.blocks(model)[number]
    masked, cut = copy.deepcopy(block), copy.deepcopy(block)
    m = 0 if whole else row_multiple(model)
    neurons = torch.stack([torch.arange(s.neurons).roll(e)[:m].sort().values for e in range(s.experts)])
    removed = torch.tensor([1] if whole else [], dtype=torch.long)
    plain = torch.arange(s.plain_removed(number, m)) + min(1, s.plain[number] - s.plain_removed(number, m))
    has = number in experts.blocks
    mask_neurons(masked, experts, number, neurons if has else None, plain)
    _cut(cut, experts, number, (removed, neurons) if has else None, plain)
    values = _values(experts, {"experts": s.experts - len(removed), "neurons": s.neurons - m})
    reference = growth.rebuilt(model, values)
    refresh(cut, cast(nn.ModuleList, reference.get_submodule(families.family_of(model).blocks))[number])
    for config in {id(c): c for mod in cut.modules() if (c := getattr(mod, "config", None)) is not None}.values():
        state(config, {name: value for name, value in values.items() if hasattr(config, name)})
    names = [part.parameter for part in (*experts.experts, *experts.neurons)]
    with masked_routers({number: (masked, removed)}, experts) if whole else _evaluation(model):
        verification.same(model, families.family_of(model).blocks, number, masked, cut, names)


def mask_neurons(block: nn.Module, experts: Experts, number: int, neurons: Tensor | None, plain: Tensor) -> None:
    """Set the weights behind the given neurons of one block to zero: (E, m) of experts, (k,) of an ordinary MLP."""
    if neurons is not None:
        [down] = [part for part in experts.neurons if part.parameter == experts.down]
        for e, gone in enumerate(neurons):
            zero(tensor(block, experts.down).data[e], gone, down.axis - 1)
    parts = experts.plain[number]
    if parts and len(plain):
        layer = block.get_submodule(plain_output(block, parts))
        zero(cast(Tensor, layer.weight).data, plain, growth.input_axis(layer))


@contextmanager
def masked_routers(blocks: Mapping[int, tuple[nn.Module, Tensor]], experts: Experts) -> Iterator[None]:
    """Give some experts of the given blocks a router score of minus infinity inside the ``with``.

    Parameters
    ----------
    blocks : number -> (block, numbers of the experts that get no token)
    """
    rows = {id(tensor(block, part.parameter)): removed for block, removed in blocks.values()
            for part in experts.experts if part.axis == 0 and tensor(block, part.parameter).ndim == 2}
    inside = experts.down.rpartition(".")[0]
    for block, removed in blocks.values():  # a correction that is added to the scores
        for part in experts.experts:
            if "bias" in part.parameter and not part.parameter.startswith(inside):
                tensor(block, part.parameter).data.index_fill_(part.axis, removed, -torch.inf)
    linear = nn.functional.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        return y.index_fill(-1, rows[id(weight)], -torch.inf) if id(weight) in rows else y

    cast(Any, nn.functional).linear = masked
    try:
        yield
    finally:
        cast(Any, nn.functional).linear = linear
