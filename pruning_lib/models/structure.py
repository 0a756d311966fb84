"""Finds heads, neurons and experts of a language model that has no record, from the shapes transformers gives it.

One size in the config is raised, the network is built once more without weights, and the parameters whose shape
follows are those that heads, groups, neurons or experts pass through.  A plain reload therefore accepts the
result.  Shapes leave the order of rows in a fused matrix open: ``layouts`` lists the possible orders, and
``verification`` tries them.
Order of this file: find · layouts · neurons · experts · heads.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from pruning_lib.models.growth import (
    PER_BLOCK,
    Growth,
    Unplaced,
    block_list,
    grown,
    input_axis,
    own_fields,
    smallest,
    stated,
    stated_width,
    text_config,
)
from pruning_lib.models.language_families import NO_EXPERTS, Experts, LanguageFamily, Part

NEURON_FIELDS = re.compile("intermediate|ffn|inner|^dff$|dim_ff$")
HEAD_FIELDS = ("decoder_attention_heads", "num_attention_heads")
GROUP_FIELDS = ("num_key_value_heads", "num_kv_heads")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
RAISE = 8  # by how many neurons a field is raised to see which shapes follow


def find(model: nn.Module) -> LanguageFamily:
    """Return a record that fits the shapes of ``model``.

    ``refused`` of the record says why heads, neurons or experts cannot be removed where that is so.

    Raises
    ------
    Unplaced
        for a model without a config of transformers or without a list of blocks.
    """
    path = block_list(model)
    refused: dict[str, str] = {}
    parts: list[Part] = []
    fields: dict[str, tuple[str, ...]] = {}
    outputs = {"heads": "", "neurons": ""}
    head_parts: tuple[tuple[Part, ...], ...] = ()
    try:
        per_block, outputs["heads"], fields = _heads(model, path)
        kinds = set(filter(None, per_block))
        head_parts = tuple(per_block) if len(kinds) > 1 else ()
        parts += kinds.pop() if len(kinds) == 1 else ()
        refused |= _refused_manners(kinds)
    except Unplaced as error:
        refused["heads"] = str(error)
    try:
        found, outputs["neurons"], more = _neurons(model, path)
        parts, fields = parts + found, fields | more
    except Unplaced as error:
        refused["neurons"] = str(error)
    experts = None
    try:
        experts = _experts(model, path)
    except Unplaced as error:
        refused["experts"] = str(error)
    return LanguageFamily(
        blocks=path, attention="", queries="", keys="", values="", neurons_in=(), heads_out=outputs["heads"],
        neurons_out=outputs["neurons"], found=True, parts=tuple(parts), head_parts=head_parts, fields=fields,
        experts=experts, refused=refused,
        multiplied_by="residual_multiplier" if hasattr(text_config(model.config), "residual_multiplier") else None)


def _refused_manners(kinds: set[tuple[Part, ...]]) -> dict[str, str]:
    """Return the manners of cutting heads that blocks of different kinds forbid, with the reason."""
    pairs = [next((part.entries for part in parts if part.unit == "groups"), 0) for parts in kinds]
    counts = {pair / max(part.entries for part in parts if part.unit == "heads")
              for pair, parts in zip(pairs, kinds, strict=True) if pair}
    refused = {}
    if counts and not all(pairs):
        refused["whole_groups"] = "some of its blocks use keys and values of other blocks"
    if len(counts) > 1:
        refused["equal_queries"] = "its blocks differ in the number of key/value heads"
    return refused


def candidates(family: LanguageFamily, unit: str) -> list[LanguageFamily]:
    """Return the record in every order of rows that may hold for one unit; heads alone, then heads in pairs."""
    if unit == "heads" and family.head_parts:
        orders = {parts: layouts(parts, unit) for parts in set(family.head_parts)}
        return [replace(family, head_parts=tuple(orders[parts][i] for parts in family.head_parts))
                for i in range(min(map(len, orders.values())))]
    found = [replace(family, parts=option) for option in layouts(family.parts, unit)]
    return found + _in_pairs(family) if unit == "heads" else found


def as_in(family: LanguageFamily, tried: LanguageFamily) -> LanguageFamily:
    """Return a record whose order could not be tried with the heads in pairs where those of ``tried`` are."""
    return next((c for c in candidates(family, "heads") if c.members == tried.members), family)


def _in_pairs(family: LanguageFamily) -> list[LanguageFamily]:
    """Return the record with heads i and i + H/2 as one, whose outputs lie side by side; none for fused matrices."""
    attention = [part for part in family.parts if part.unit in ("heads", "groups")]
    if any(_shared(part, family.parts) or part.pieces > 1 for part in attention if part.unit == "groups"):
        return []
    paired = tuple(replace(part, entries=2 * part.entries, pieces=1 + (part.parameter != f"{family.heads_out}.weight"))
                   if part in attention else part for part in family.parts)
    return [replace(family, parts=paired, members=2)]


def layouts(parts: tuple[Part, ...], unit: str) -> list[tuple[Part, ...]]:
    """Return ``parts`` with every order of rows that matrices with several rows per ``unit`` may have."""
    choices = [_orders(part, parts) if part.unit == unit else [part] for part in parts]
    fused = [part for part in parts if part.unit == "groups" and _shared(part, parts)] if unit == "heads" else []
    found = list(itertools.product(*choices))
    if fused:
        names = {part.parameter for part in fused}
        split = [tuple(replace(p, pieces=2) if p in fused else p for p in option) for option in found]
        grouped = [tuple(replace(p, grouped=p.parameter in names) for p in option) for option in found]
        found = split + grouped
    return found[:8]


def _orders(part: Part, parts: tuple[Part, ...]) -> list[Part]:
    """Return one part with its possible orders: in equal pieces one after the other, or side by side."""
    columns = min(p.entries for p in parts if p.unit == part.unit)
    pieces = part.entries // columns
    if pieces < 2 or part.entries % columns:
        return [part]
    apart, together = replace(part, pieces=pieces), part
    return [apart, together] if part.unit in ("neurons", "plain") else [together, apart]


def _shared(part: Part, parts: tuple[Part, ...]) -> bool:
    where = part.parameter, part.axis
    return any(other.unit == "heads" and (other.parameter, other.axis) == where for other in parts)


def _neuron_growths(model: nn.Module, path: str) -> dict[str, list[tuple[Growth, ...]]]:
    """Return the axes that follow each config field whose name speaks of the inside of an MLP."""
    text, found = text_config(model.config), {}
    for name, value in text.to_dict().items():
        per_block = isinstance(value, list) and bool(value) and all(v == value[0] and type(v) is int for v in value)
        if NEURON_FIELDS.search(name) and (value is None or type(value) is int or per_block):
            base = (value[0] if per_block else value) or 4 * text.hidden_size
            try:
                growths = grown(model, path, stated(text, [name], base), stated(text, [name], base + RAISE), RAISE)
            except Unplaced:
                continue
            if any(growths):
                found[name] = growths
    return found


def _neurons(model: nn.Module, path: str) -> tuple[list[Part], str, dict[str, tuple[str, ...]]]:
    """Place the neurons of the MLP of every block that has one."""
    reasons = []
    for name, growths in _neuron_growths(model, path).items():
        first = next(i for i, rows in enumerate(growths) if rows)
        kinds, rows = set(filter(None, growths)), growths[first]
        if any(row.dimensions == 3 and "conv" not in row.parameter for rows in growths for row in rows):
            reasons.append(f"{name} sizes the neurons of experts; see 'experts'")
        elif len(kinds) > 1:
            reasons.append(f"{name} sizes {len(kinds)} kinds of MLPs, which differ in their parameters")
        elif len(outputs := _output_projections(model, path, first, rows)) != 1:
            reasons.append(f"{name} sizes more than one MLP: {', '.join(row.parameter for row in rows[:6])}")
        elif any(row.dimensions > 2 for row in rows):
            reasons.append(f"{name} sizes a mixer of tokens, not an MLP")
        elif outputs[0].entries != 1:
            reasons.append(f"{name} counts in steps of {outputs[0].entries} neurons")
        else:
            parts = [row.part("neurons") for row in rows]
            return parts, outputs[0].parameter.removesuffix(".weight"), {"neurons": (name,)}
    raise Unplaced("; ".join(reasons) or "no field of its config states the number of neurons, transformers computes "
                                         "it from the width")


def _output_projections(model: nn.Module, path: str, block: int, rows: tuple[Growth, ...]) -> list[Growth]:
    """Return the growths that are the input side of a linear layer."""
    module = cast(nn.ModuleList, model.get_submodule(path))[block]
    return [row for row in rows if row.parameter.endswith(".weight") and row.dimensions == 2
            and row.axis == input_axis(module.get_submodule(row.parameter.removesuffix(".weight")))]


def _experts(model: nn.Module, path: str) -> Experts:
    """Place whole experts, and the neurons inside them."""
    text = text_config(model.config)
    inside = {name: growths for name, growths in _neuron_growths(model, path).items()
              if any(row.dimensions == 3 and "conv" not in row.parameter for rows in growths for row in rows)}
    if not inside:
        raise Unplaced(NO_EXPERTS)
    field, growths = next(iter(inside.items()))
    blocks = tuple(i for i, rows in enumerate(growths) if any(row.dimensions == 3 for row in rows))
    count = next((name for name in EXPERT_FIELDS if type(getattr(text, name, None)) is int), None)
    if count is None:
        raise Unplaced("no field of its config states the number of experts")
    E = getattr(text, count)
    whole = grown(model, path, {count: E}, {count: 2 * E}, E)
    along = {row.parameter for i in blocks for row in whole[i]}
    neurons = {row for i in blocks for row in growths[i] if row.parameter in along}
    if len({tuple(whole[i]) for i in blocks}) > 1 or len({row.parameter for row in neurons}) != len(neurons):
        raise Unplaced(f"its experts differ from block to block ({field}, {count})")
    plain = tuple(tuple(row.part("plain") for row in rows if row.parameter not in along) for rows in growths)
    tensors = [row.parameter for row in sorted(neurons, key=lambda row: row.parameter) if row.dimensions == 3]
    down = next((name for name in tensors if re.search("down|output|w2", name)), "")
    if not down:
        raise Unplaced(f"which of {', '.join(tensors)} leads back to the residual stream could not be told")
    return Experts(blocks, down, tuple(row.part("experts") for row in whole[blocks[0]]),
                   tuple(row.part("neurons") for row in sorted(neurons, key=lambda row: row.parameter)), plain,
                   {"experts": (count,), "neurons": (field,)})


def _heads(model: nn.Module, path: str) -> tuple[list[tuple[Part, ...]], str, dict[str, tuple[str, ...]]]:
    """Place the query heads and the key/value groups of the attention of every block; no parts for one without."""
    text = text_config(model.config)
    known = text.to_dict()
    count = next((name for name in HEAD_FIELDS if type(getattr(text, name, None)) is int), None)
    if count is None:
        raise Unplaced("no field of its config states a number of attention heads")
    pairs = next((name for name in GROUP_FIELDS if type(known.get(name)) is int), None)
    H, G = getattr(text, count), smallest(text, pairs) if pairs else 0
    alone: dict[str, tuple[str, ...]] = {"heads": (count,), "groups": (pairs,) if pairs else ()}
    fields = {unit: _same_size(text, names[0]) if names else () for unit, names in alone.items()}
    try:
        queries, groups = _placed_heads(model, path, fields, H, G or H)
    except Unplaced:
        if fields == alone:
            raise
        fields = alone  # fields for other blocks stay as they are, and so do the heads of those blocks
        queries, groups = _placed_heads(model, path, fields, H, G or H)
    first = next(i for i, rows in enumerate(queries) if rows)
    [out] = _output_projections(model, path, first, queries[first])
    per_block = [tuple([row.part("heads") for row in own] + [row.part("groups") for row in beside])
                 for own, beside in zip(queries, groups, strict=True)]
    return per_block, out.parameter.removesuffix(".weight"), fields


def _same_size(text: Any, name: str) -> tuple[str, ...]:
    """Return a count and the fields named after it that state the same number, for other blocks or for every block."""
    known = text.to_dict()
    count = known[name] if name in known else getattr(text, name)
    longer = {other: value for other, value in known.items() if name in other and other != name}
    mixed = [other for other, value in longer.items() if isinstance(value, list) and any(v != count for v in value)]
    mixed += [PER_BLOCK] if any(HEAD_FIELDS[-1] in fields for fields in own_fields(text).values()) else []
    if mixed:
        raise Unplaced(f"its blocks have different numbers of heads ({mixed[0]})")
    return (name, *(other for other, value in longer.items() if isinstance(value, list) or value == count))


def _placed_heads(model: nn.Module, path: str, fields: Mapping[str, tuple[str, ...]], H: int, G: int
                  ) -> tuple[list[tuple[Growth, ...]], list[tuple[Growth, ...]]]:
    queries, groups = _head_growths(model, path, fields, H, G)
    _refuse_heads(model, path, queries, groups)
    return queries, groups


def _head_growths(model: nn.Module, path: str, fields: Mapping[str, tuple[str, ...]], H: int, G: int
                  ) -> tuple[list[tuple[Growth, ...]], list[tuple[Growth, ...]]]:
    """Return the axes that follow the heads alone, and those of the groups alone; none where both grow together."""
    text = text_config(model.config)
    width = stated_width(text, text.hidden_size // H)

    def sized(heads: int, groups: int) -> dict[str, Any]:
        return {**width, **stated(text, fields["heads"], heads), **stated(text, fields["groups"], groups)}

    if fields["groups"]:
        try:
            queries = grown(model, path, sized(H, G), sized(2 * H, G), H)
            groups = grown(model, path, sized(2 * H, G), sized(2 * H, 2 * G), G)
            if any(groups) or H != G:
                return queries, groups
        except Unplaced:
            if H != G:
                raise
    together = grown(model, path, sized(H, G), sized(2 * H, 2 * G), H)
    return together, [() for _ in together]


def _refuse_heads(model: nn.Module, path: str, queries: list[tuple[Growth, ...]], groups: list[tuple[Growth, ...]]
                  ) -> None:
    having = [i for i, rows in enumerate(queries) if rows]
    blocks = cast(nn.ModuleList, model.get_submodule(path))
    if not having or any(row.entries < 0 for row in queries[having[0]]):
        raise Unplaced("no projection follows the number of heads alone: transformers computes the head width as width "
                       "/ heads")
    kinds = {(queries[i], groups[i]) for i in having}
    names = {row.parameter for row in (*queries[having[0]], *groups[having[0]])}
    others = [block for i, block in enumerate(blocks)
              if i not in having and names <= dict(block.named_parameters()).keys()]
    outputs = {i: _output_projections(model, path, i, queries[i]) for i in having}
    places = {tuple(row.parameter for row in rows) for rows in outputs.values()}
    if len(places) > 1 or others or any(rows for i, rows in enumerate(groups) if i not in having):
        raise Unplaced(f"its blocks have {max(2, len(kinds))} kinds of attention, which differ in the parameters that "
                       f"follow the number of heads")
    if len(outputs[having[0]]) != 1:
        raise Unplaced("a block has more than one attention" if outputs[having[0]] else
                       "the output projection of its attention does not follow the number of heads")
