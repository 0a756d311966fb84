"""The tensors that heads and neurons of one block pass through, and the rows and columns that belong to each of them.

Order of this file: linear layers · parts · places · projections of families with a record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models.growth import input_axis, smallest
from pruning_lib.models.language_families import LanguageFamily, Part


@dataclass(frozen=True)
class Rows:
    """One projection of a block: the rows of a linear layer that belong to it, all of them unless it is fused."""

    linear: nn.Linear
    start: int
    count: int

    def of(self, rows: Tensor) -> Tensor:
        """Return the part of this projection, of a tensor that has one row per output of the layer."""
        return rows[self.start:self.start + self.count]


@dataclass(frozen=True)
class Projections:
    """Everything that heads and neurons of one block pass through."""

    queries: Rows  # (H*D, C)
    keys: Rows  # (G*D, C)
    values: Rows
    neurons_in: tuple[Rows, ...]  # each (M, C)
    heads_out: nn.Linear  # (C, H*D)
    neurons_out: nn.Linear  # (C, M)


def linear(block: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at ``path`` inside a block."""
    return cast(nn.Linear, block.get_submodule(path))


def matrix(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in), a view; GPT-2's layers store it the other way round."""
    weight = cast(Tensor, layer.weight)
    return weight.T if input_axis(layer) == 0 else weight


def tensor(block: nn.Module, path: str) -> Tensor:
    """Return the parameter or buffer at ``path`` inside a block."""
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(block.get_submodule(owner), name))


def has(block: nn.Module, family: LanguageFamily, unit: str) -> bool:
    """Return whether a block has heads, or neurons, of the family's kind: some models mix blocks with and without."""
    path, units = (family.heads_out, ("heads", "groups")) if unit == "heads" else (family.neurons_out, ("neurons",))
    names = [f"{path}.weight"] if path else []
    names += [part.parameter for part in family.parts if part.unit in units]
    known = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
    return bool(path) and known.issuperset(names)


def block_parts(block: nn.Module, family: LanguageFamily, D: int) -> tuple[Part, ...]:
    """Return the parts of one block for heads of width ``D``: those a record lists, or those its paths name."""
    if family.found:
        units = {"heads": has(block, family, "heads"), "neurons": has(block, family, "neurons")}
        return tuple(part for part in family.parts if units[{"groups": "heads"}.get(part.unit, part.unit)])
    named = [(family.queries, 0, "heads", D), (family.keys, 0, "groups", D), (family.values, 0, "groups", D),
             *((path, 0, "neurons", 1) for path in family.neurons_in),
             (family.heads_out, 1, "heads", D), (family.neurons_out, 1, "neurons", 1)]
    found = []
    for path, axis, unit, entries in named:
        found.append(Part(f"{path}.weight", axis, unit, entries))
        if axis == 0 and linear(block, path).bias is not None:
            found.append(Part(f"{path}.bias", axis, unit, entries))
    return tuple(found)


def places(parts: Iterable[Part], counts: Mapping[str, int]) -> list[tuple[Part, Tensor]]:
    """Return each part with the entries (units, entries) of every unit along its axis.

    Parts of the same axis of the same tensor follow one another, unless they are grouped.

    Parameters
    ----------
    counts : how many of each unit the block has
    """
    by_axis: dict[tuple[str, int], list[Part]] = defaultdict(list)
    for part in parts:
        by_axis[part.parameter, part.axis].append(part)
    found = []
    for members in by_axis.values():
        if any(part.grouped for part in members):
            found += _grouped(members, counts)
            continue
        start = 0
        for part in members:
            found.append((part, start + part.places(counts[part.unit])))
            start += counts[part.unit] * part.entries
    return found


def _grouped(members: list[Part], counts: Mapping[str, int]) -> list[tuple[Part, Tensor]]:
    """Return the entries where every group has those of its query heads first, then its own."""
    G, per_group = counts["groups"], counts["heads"] // counts["groups"]
    heads, pairs = (next(part for part in members if part.unit == unit) for unit in ("heads", "groups"))
    along = torch.arange(G * (per_group * heads.entries + pairs.entries)).view(G, -1)
    own = along[:, :per_group * heads.entries].reshape(G * per_group, heads.entries)
    return [(heads, own), (pairs, along[:, per_group * heads.entries:])]


def keep(block: nn.Module, parts: Iterable[Part], counts: Mapping[str, int], kept: Mapping[str, Tensor]
         ) -> dict[tuple[str, int], Tensor]:
    """Return, for every tensor and axis of a block, the entries that stay when the units in ``kept`` stay."""
    stays: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for part, entries in places(parts, counts):
        chosen = entries[kept[part.unit]] if part.unit in kept else entries
        stays[part.parameter, part.axis].append(chosen.flatten())
    return {where: torch.cat(chosen).sort().values for where, chosen in stays.items()}


def projections(block: nn.Module, family: LanguageFamily) -> Projections:
    """Return the projections of one block of a family with a record, fused ones taken apart."""
    out, down = linear(block, family.heads_out), linear(block, family.neurons_out)
    shared = family.queries == family.keys
    pairs = linear(block, family.keys).out_features - shared * out.in_features
    pairs //= 1 + (family.keys == family.values)
    counts = [(family.queries, out.in_features), (family.keys, pairs), (family.values, pairs),
              *((path, down.in_features) for path in family.neurons_in)]
    start, rows = dict.fromkeys(dict(counts), 0), []
    for path, count in counts:
        rows.append(Rows(linear(block, path), start[path], count))
        start[path] += count
    return Projections(rows[0], rows[1], rows[2], tuple(rows[3:]), out, down)


def named_paths(family: LanguageFamily) -> tuple[str, ...]:
    """Return the paths of all linear layers that heads and neurons pass through."""
    if family.found:
        return tuple(dict.fromkeys(p.parameter.removesuffix(".weight") for p in sum(family.head_parts, family.parts)
                                   if p.parameter.endswith(".weight") and "norm" not in p.parameter))
    return (family.queries, family.keys, family.values, family.heads_out, *family.neurons_in, family.neurons_out)


def block_counts(block: nn.Module, family: LanguageFamily, config: Any, D: int) -> dict[str, int]:
    """Return the numbers of heads, groups and neurons of one block, read from its output projections; 0 without."""
    H = matrix(block.get_submodule(family.heads_out)).shape[1] // D if has(block, family, "heads") else 0
    M = matrix(block.get_submodule(family.neurons_out)).shape[1] if has(block, family, "neurons") else 0
    if family.found:
        fields = family.fields.get("groups", ())
        G = smallest(config, fields[0]) // family.members if fields and H else H
        return {"heads": H, "groups": G, "neurons": M}
    return {"heads": H, "groups": projections(block, family).keys.count // D, "neurons": M}
