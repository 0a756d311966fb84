"""Finds heads, neurons and experts of a language model that has no record, from the shapes transformers gives it.

One size in the config is raised, the network is built once more without weights, and the parameters whose shape
follows are those that heads, groups, neurons or experts pass through.  A plain reload therefore accepts the
result.  Shapes leave the order of rows in a fused matrix open: ``layouts`` lists the possible orders, and
``verification`` tries them.
Order of this file: find · blocks · growth · neurons · experts · heads.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models.language_families import NO_EXPERTS, Experts, LanguageFamily, Part
from pruning_lib.models.parameter_counts import parameter_count

Values = Mapping[str, Any]  # config field -> size, or a list of sizes with one entry per block
NEURON_FIELDS = re.compile("intermediate|ffn|inner|^dff$|dim_ff$")
HEAD_FIELDS = ("decoder_attention_heads", "num_attention_heads")
GROUP_FIELDS = ("num_key_value_heads", "num_kv_heads")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OTHER_TOWERS = re.compile("vision|visual|image|audio|speech")  # names of modules that read something else than text
NUMBERS = re.compile("idx|index|layer_id|layer_num|block_id|num.*layers")  # attributes: number of a block, or of all
RAISE = 8  # by how many neurons a field is raised to see which shapes follow


@dataclass(frozen=True)
class Growth:
    """Growth of one axis of one tensor of a block, in entries per step of a size in the config."""

    parameter: str
    axis: int
    entries: int
    dimensions: int

    def part(self, unit: str) -> Part:
        """Return the part of a block that this axis is, for one unit."""
        return Part(self.parameter, self.axis, unit, self.entries)


class Unplaced(ValueError):
    """Says which part of a network could not be placed, and why."""


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
    for unit, search in (("heads", _heads), ("neurons", _neurons)):
        try:
            found, outputs[unit], more = search(model, path)
            parts, fields = parts + found, fields | more
        except Unplaced as error:
            refused[unit] = str(error)
    experts = None
    try:
        experts = _experts(model, path)
    except Unplaced as error:
        refused["experts"] = str(error)
    return LanguageFamily(
        blocks=path, attention="", queries="", keys="", values="", neurons_in=(), heads_out=outputs["heads"],
        neurons_out=outputs["neurons"], found=True, parts=tuple(parts), fields=fields, experts=experts, refused=refused,
        multiplied_by="residual_multiplier" if hasattr(text_config(model.config), "residual_multiplier") else None)


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


def text_config(config: Any) -> Any:
    """Return the config of the decoder, which a multimodal config holds beside others."""
    text = config.get_text_config(decoder=True)  # of an encoder-decoder a copy, in which nothing can be set
    return text if any(value is text for value in vars(config).values()) else config


def block_list(model: nn.Module) -> str:
    """Return the path of the decoder blocks: of all lists of modules in the decoder, the one with most parameters.

    Raises
    ------
    Unplaced
        for a network without a config of transformers, or without such a list.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise Unplaced(f"{type(model).__name__} is no model of transformers")
    decoder = _decoder(model)
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model  # some call their output layer the decoder
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = {name: parameter_count(module) for name, module in decoder.named_modules()
             if isinstance(module, nn.ModuleList) and len(module)}
    outer = {name: n for name, n in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise Unplaced(f"{type(model).__name__} has no list of blocks")
    text = {name: n for name, n in outer.items() if not OTHER_TOWERS.search(name)}
    outer = text or outer
    return ".".join(filter(None, [prefix, max(outer, key=lambda name: outer[name])]))


def _decoder(model: Any) -> Any:
    """Return the text decoder of a model; the model itself where it names none."""
    try:
        return model.get_decoder() or model
    except (AttributeError, NotImplementedError):
        return model


def rebuilt(model: nn.Module, values: Values) -> nn.Module:
    """Return the network, without weights, that transformers builds from the model's config with other sizes.

    Raises
    ------
    Unplaced
        when the config class or the network refuses these sizes.
    """
    config: Any = copy.deepcopy(model.config)
    try:
        for name, value in values.items():
            _set(text_config(config), name, value)
        config = type(config).from_dict(config.to_dict())  # validated, as when a checkpoint is loaded
        config._attn_implementation = getattr(model.config, "_attn_implementation", None)
        with torch.device("meta"):
            return type(model)(config)
    except Exception as error:  # transformers raises many kinds
        wanted = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise Unplaced(f"transformers builds no such network with {wanted} ({str(error).strip()[:200]})") from error


def _set(config: Any, name: str, value: Any) -> None:
    """Set a config field; the head width is left alone where it is computed from others."""
    try:
        setattr(config, name, value)
    except AttributeError:
        if name != "head_dim":
            raise


def grown(model: nn.Module, path: str, small: Values, large: Values, steps: int) -> list[tuple[Growth, ...]]:
    """Return, for every block, the axes that follow when a size grows by ``steps`` from ``small`` to ``large``.

    Raises
    ------
    Unplaced
        when transformers refuses one of the sizes, or something outside the blocks follows.
    """
    before, after = (rebuilt(model, values).state_dict() for values in (small, large))
    found: list[list[Growth]] = [[] for _ in cast(nn.ModuleList, model.get_submodule(path))]
    for name, tensor in before.items():
        match = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", name)
        for axis, steps_of in enumerate(_steps(name, tensor, after)):
            if steps_of and match is None:
                raise Unplaced(f"{name}, which is in no block, has a size that follows {', '.join(large)}")
            if steps_of and match:
                found[int(match[1])].append(Growth(match[2], axis, steps_of // steps, tensor.ndim))
    return [tuple(rows) for rows in found]


def _steps(name: str, tensor: Tensor, after: Mapping[str, Tensor]) -> list[int]:
    if name not in after or after[name].ndim != tensor.ndim:
        raise Unplaced(f"{name} is there only with some sizes")
    return [long - short for short, long in zip(tensor.shape, after[name].shape, strict=True)]


def _neuron_growths(model: nn.Module, path: str) -> dict[str, list[tuple[Growth, ...]]]:
    """Return the axes that follow each config field whose name speaks of the inside of an MLP."""
    text, found = text_config(model.config), {}
    for name, value in text.to_dict().items():
        per_block = isinstance(value, list) and len(set(value)) == 1
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


def settings(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, texts and flags that a module keeps for itself."""
    return {key: value for key, value in vars(module).items()
            if not key.startswith("_") and (value is None or type(value) in (int, float, str, bool))}


def kind(block: nn.Module) -> tuple:
    """Return everything two blocks of the same kind have in common: classes and settings, but numbers of blocks."""
    return tuple((name, type(module).__name__, tuple((key, value) for key, value in settings(module).items()
                                                     if not NUMBERS.search(key)))
                 for name, module in block.named_modules())


def input_axis(layer: nn.Module) -> int:
    """Return the axis of a linear layer's weight along which its inputs lie; -1 for another kind of layer."""
    if type(layer).__name__ == "Conv1D":  # GPT-2 stores (in, out)
        return 0
    return 1 if hasattr(layer, "in_features") else -1


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


def _heads(model: nn.Module, path: str) -> tuple[list[Part], str, dict[str, tuple[str, ...]]]:
    """Place the query heads and the key/value groups of the attention of every block that has one."""
    text = text_config(model.config)
    known = text.to_dict()
    count = next((name for name in HEAD_FIELDS if type(getattr(text, name, None)) is int), None)
    if count is None:
        raise Unplaced("no field of its config states a number of attention heads")
    pairs = next((name for name in GROUP_FIELDS if type(known.get(name)) is int), None)
    H = getattr(text, count)
    fields = {"heads": _same_size(text, count), "groups": _same_size(text, pairs) if pairs else ()}
    queries, groups = _head_growths(model, path, fields, H, known[pairs] if pairs else H)
    _refuse_heads(model, path, queries, groups)
    first = next(i for i, rows in enumerate(queries) if rows)
    parts = [row.part("heads") for row in queries[first]] + [row.part("groups") for row in groups[first]]
    [out] = _output_projections(model, path, first, queries[first])
    return parts, out.parameter.removesuffix(".weight"), fields


def _same_size(text: Any, name: str) -> tuple[str, ...]:
    """Return a count and the fields named after it that state the same number, for other blocks or for every block."""
    known = text.to_dict()
    count = known[name] if name in known else getattr(text, name)
    longer = {other: value for other, value in known.items() if name in other and other != name}
    mixed = [other for other, value in longer.items() if isinstance(value, list) and set(value) - {count}]
    if mixed:
        raise Unplaced(f"its blocks have different numbers of heads ({mixed[0]})")
    return (name, *(other for other, value in longer.items() if isinstance(value, list) or value == count))


def stated(text: Any, names: Iterable[str], count: int) -> dict[str, Any]:
    """Return the fields with a new count: a list gets it for every block."""
    values = {name: getattr(text, name, None) for name in names}
    return {name: [count] * len(value) if isinstance(value, list) else count for name, value in values.items()}


def stated_width(text: Any, otherwise: int) -> dict[str, int]:
    """Return the config field with the width of a head; none where the config has a width for every block."""
    try:
        return {"head_dim": getattr(text, "head_dim", None) or otherwise}
    except Exception:  # transformers has a class of its own for a field that blocks state differently
        return {}


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
    names = {row.parameter for row in queries[having[0]]}
    others = [block for i, block in enumerate(blocks) if i not in having and names <= dict(block.named_parameters()).keys()]
    if len(kinds) > 1 or others or any(rows for i, rows in enumerate(groups) if i not in having):
        raise Unplaced(f"its blocks have {max(2, len(kinds))} kinds of attention, which differ in the parameters that "
                       f"follow the number of heads")
    outputs = _output_projections(model, path, having[0], queries[having[0]])
    if len(outputs) != 1:
        raise Unplaced("the output projection of its attention does not follow the number of heads" if not outputs else
                       "a block has more than one attention")
