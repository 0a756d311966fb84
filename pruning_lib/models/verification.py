"""Tries a record that ``structure`` found: one unit masked, the same unit removed, and logits compared.

Order of this file: a record · one unit · the swap of a block · norms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models import offload
from pruning_lib.models.cutting import cut_block, refresh, state, zero
from pruning_lib.models.growth import Unplaced, input_axis, kind, rebuilt, stated, stated_width, text_config, value_of
from pruning_lib.models.language_families import LanguageFamily
from pruning_lib.models.parts import block_counts, block_parts, has, places
from pruning_lib.models.structure import candidates

EXACT = 1e-4  # largest difference of two logits, as a share of the largest logit, that passes for rounding
ROUGH = 0.25  # the same in 16 bits, as a share of the change that masking makes


def verified(model: nn.Module, family: LanguageFamily) -> LanguageFamily:
    """Return the record with the layouts that hold for ``model``, and units that do not hold refused with the reason.

    A model whose weights are not available (on the meta device, on disk) keeps the usual layouts, and ``verified``
    of its record stays False.
    """
    if any(p.device.type == "meta" for p in model.parameters()):
        return family
    was_training = model.training
    model.eval()
    try:
        logits(model)
        for unit in ("neurons", "heads"):
            if unit in family.fields:
                family = _verified_unit(model, family, unit)
        family = replace(family, **_norms(model, family))
    except Exception as error:
        reason = f"it does not run on token numbers alone: {type(error).__name__}: {str(error)[:150]}"
        family = without(without(family, "heads", reason), "neurons", reason)
    finally:
        model.train(was_training)
    return replace(family, verified=True)


def without(family: LanguageFamily, unit: str, reason: str) -> LanguageFamily:
    """Return the record with one unit refused."""
    gone = {"heads": ("heads", "groups"), "neurons": ("neurons",)}[unit]
    return replace(family, refused={**family.refused, unit: family.refused.get(unit, reason)},
                   parts=tuple(part for part in family.parts if part.unit not in gone),
                   head_parts=() if unit == "heads" else family.head_parts,
                   fields={name: fields for name, fields in family.fields.items() if name not in gone},
                   heads_out="" if unit == "heads" else family.heads_out,
                   neurons_out="" if unit == "neurons" else family.neurons_out)


def _verified_unit(model: nn.Module, family: LanguageFamily, unit: str) -> LanguageFamily:
    """Return the record in the first layout that passes all trials, or in one that passes some of those of heads."""
    reason, partly = "", None
    for candidate in candidates(family, unit):
        if unit == "heads" and any(model_counts(model, family)[u] % candidate.members for u in ("heads", "groups")):
            continue
        failed = _failures(model, candidate, unit)
        if not failed:
            return candidate
        reason = reason or next(iter(failed.values()))
        if not partly and len(failed) < len(trials(model, candidate, unit)):
            partly = replace(candidate, refused={**family.refused, **failed})
    return partly or without(family, unit, reason)


def _failures(model: nn.Module, family: LanguageFamily, unit: str) -> dict[str, str]:
    """Return the reason of every trial that fails, by the manner in which it cuts."""
    failed = {}
    try:
        for removed in trials(model, family, unit):
            try:
                if manner(removed) in family.refused:
                    raise Unplaced(family.refused[manner(removed)])
                _compare(model, family, removed)
            except Unplaced as error:
                failed[manner(removed)] = str(error)
    except Unplaced as error:  # nothing to try
        failed["heads"] = str(error)
    return failed


def manner(removed: Mapping[str, Tensor]) -> str:
    """Return how a trial cuts: as ``plan.GROUPED`` names it, or "neurons"."""
    return "neurons" if "neurons" in removed else "whole_groups" if "groups" in removed else "equal_queries"


def trials(model: nn.Module, family: LanguageFamily, unit: str) -> list[dict[str, Tensor]]:
    """Return what to remove to try one unit: half of the neurons, whole groups, or one query of every group."""
    counts = model_counts(model, family)
    if unit == "neurons":
        order = torch.randperm(counts["neurons"], generator=torch.Generator().manual_seed(0))
        return [{"neurons": order[:counts["neurons"] // 2].sort().values}]  # many, so that most tokens need some
    H, G = counts["heads"], counts["groups"]
    along, found = torch.arange(H).view(G, -1), []
    if G > 1:
        found.append([{"heads": along[k:].flatten(), "groups": torch.arange(G)[k:]} for k in range(G - 1, 0, -1)])
    if H > G:
        found.append([{"heads": along[:, k:].flatten()} for k in range(H // G - 1, 0, -1)])
    if not found:
        raise Unplaced("a block has a single attention head")
    return [next((t for t in options if _storable(model, family, counts, t)), options[0]) for options in found]


def _storable(model: nn.Module, family: LanguageFamily, counts: Mapping[str, int], removed: Mapping[str, Tensor]
              ) -> bool:
    try:
        rebuilt(model, values_of(model, family, _left(counts, removed)))
    except Unplaced:
        return False
    return True


def _left(counts: Mapping[str, int], removed: Mapping[str, Tensor]) -> dict[str, int]:
    return {unit: n - len(removed.get(unit, ())) for unit, n in counts.items()}


def values_of(model: nn.Module, family: LanguageFamily, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the config fields that state these counts, the head width with the heads."""
    text, values = text_config(cast(Any, model).config), dict[str, Any]()
    for unit, names in family.fields.items():
        values |= stated(text, names, counts[unit] * (1 if unit == "neurons" else family.members))
    width = columns(family) // family.members
    return values | (stated_width(text, width) if "heads" in family.fields else {})


def columns(family: LanguageFamily) -> int:
    """Return how many columns of its output projection belong to one head, in the first block with heads; 0 without."""
    return next((part.entries for part in sum(family.head_parts, family.parts)
                 if part.parameter == f"{family.heads_out}.weight"), 0)


def model_counts(model: nn.Module, family: LanguageFamily) -> dict[str, int]:
    """Return the numbers of heads, groups and neurons of the blocks that have them."""
    config, blocks = text_config(cast(Any, model).config), cast(nn.ModuleList, model.get_submodule(family.blocks))
    own = [family.of_block(i) for i in range(len(blocks))]
    found = [block_counts(block, kind, config, columns(kind)) for block, kind in zip(blocks, own, strict=True)]
    return {unit: max(counts[unit] for counts in found) for unit in ("heads", "groups", "neurons")}


def one_of_each_kind(model: nn.Module, family: LanguageFamily, unit: str) -> list[int]:
    """Return the numbers of the first block of every kind that has heads, or neurons."""
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    kinds = {kind(block): i for i, block in reversed(list(enumerate(blocks)))
             if has(block, family.of_block(i), unit)}
    return sorted(kinds.values())


def block_with(model: nn.Module, family: LanguageFamily, unit: str) -> nn.Module:
    """Return the first block that has heads, or neurons."""
    return cast(nn.ModuleList, model.get_submodule(family.blocks))[one_of_each_kind(model, family, unit)[0]]


def _compare(model: nn.Module, family: LanguageFamily, removed: Mapping[str, Tensor]) -> None:
    """Raise Unplaced unless a block of every kind gives the same without ``removed`` as with ``removed`` masked."""
    for number in one_of_each_kind(model, family, "heads" if "heads" in removed else "neurons"):
        _compare_block(model, family, removed, number)


def _compare_block(model: nn.Module, family: LanguageFamily, removed: Mapping[str, Tensor], number: int) -> None:
    block, own = cast(nn.ModuleList, model.get_submodule(family.blocks))[number], family.of_block(number)
    parts = block_parts(block, own, columns(own))
    counts = model_counts(model, family)
    masked, cut = copy.deepcopy(block), copy.deepcopy(block)
    for path, unit in ((family.heads_out, "heads"), (family.neurons_out, "neurons")):
        if unit in removed:
            layer = masked.get_submodule(path)
            [(_, entries)] = [(p, e) for p, e in places(parts, counts) if p.parameter == f"{path}.weight"]
            zero(cast(Tensor, layer.weight), entries[removed[unit]].flatten(), input_axis(layer))
    kept = {unit: _others(counts[unit], gone) for unit, gone in removed.items()}
    values = values_of(model, family, _left(counts, removed))
    cut_block(cut, parts, counts, kept)
    refresh(cut, cast(nn.ModuleList, rebuilt(model, values).get_submodule(family.blocks))[number])
    for config in {id(c): c for m in cut.modules() if (c := getattr(m, "config", None)) is not None}.values():
        state(config, {name: value for name, value in values.items() if value_of(config, name) is not None})
    same(model, family.blocks, number, masked, cut, [p.parameter for p in parts if p.unit in removed])


def _others(count: int, gone: Tensor) -> Tensor:
    stays = torch.ones(count, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def same(model: nn.Module, path: str, number: int, masked: nn.Module, cut: nn.Module, parameters: list[str]) -> None:
    """Raise Unplaced unless the model gives the same logits with either block in the place of one of its own."""
    found = []
    for other in (None, masked, cut):
        with swapped(cast(nn.ModuleList, model.get_submodule(path)), number, other):
            try:
                found.append(logits(model))
            except Exception as error:
                raise Unplaced(f"after the cut the network does not run: {type(error).__name__}: {str(error)[:150]}"
                               ) from error
    dense, wanted, got = found
    difference, effect = (got - wanted).abs().max(), (dense - wanted).abs().max()
    rough = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not difference <= (ROUGH * effect if rough else EXACT * wanted.abs().max()):
        norms = [name for name in parameters if "norm" in name]
        raise Unplaced("removing does not equal masking" + (
            f": {', '.join(norms)} takes all of them together" if norms else
            f" (logits differ by {float(difference):.2g}) with any order of the rows of {', '.join(parameters[:4])}"))


@contextmanager
def swapped(blocks: nn.ModuleList, number: int, other: nn.Module | None) -> Iterator[None]:
    """Put another block in the place of one of the list, inside the ``with``."""
    own = blocks[number]
    blocks[number] = own if other is None else other
    try:
        yield
    finally:
        blocks[number] = own


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits (1, 2, vocabulary) of two tokens, float32."""
    ids = torch.tensor([[5, 6]], device=offload.input_device(model))
    return model(input_ids=ids, use_cache=False).logits.float()


def _norms(model: nn.Module, family: LanguageFamily) -> dict[str, Any]:
    """Return the norms behind the output projections, and the blocks' kind of output."""
    found: dict[str, Any] = {"heads_norm": "", "neurons_norm": ""}
    block = cast(nn.ModuleList, model.get_submodule(family.blocks))[0]
    handles = [block.register_forward_hook(lambda _, args, y: found.update(block_outputs=_length(y)))]
    for unit, path in (("heads", family.heads_out), ("neurons", family.neurons_out)):
        if path:
            handles += _norm_hooks(block_with(model, family, unit), path, f"{unit}_norm", found)
    logits(model)
    for handle in handles:
        handle.remove()
    return found


def _length(output: Any) -> int:
    return len(output) if isinstance(output, tuple | list) else 0


def _norm_hooks(block: nn.Module, path: str, key: str, found: dict[str, Any]) -> list[Any]:
    """Return the handles of hooks that write to ``found[key]`` the name of the norm which takes the output of ``path``.

    The output is recognised by its place in memory.
    """
    seen: list[Tensor] = []
    handles = [block.get_submodule(path).register_forward_hook(lambda _, args, y: seen.append(y))]
    for name, module in block.named_modules():
        if "norm" in name.lower() and not list(module.children()):
            def look(_: nn.Module, args: tuple, name: str = name) -> None:
                if seen and args and args[0].data_ptr() == seen[-1].data_ptr() and args[0].shape == seen[-1].shape:
                    found[key] = name
            handles.append(module.register_forward_pre_hook(look))
    return handles
