"""Networks that transformers builds for other sizes, and the axes of parameters that follow a size in the config.

Order of this file: growth · decoder and blocks · other sizes · settings of modules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models.language_families import Part
from pruning_lib.models.parameter_counts import parameter_count

Values = Mapping[str, Any]  # config field -> size, or a list of sizes with one entry per block
OTHER_TOWERS = re.compile("vision|visual|image|audio|speech")  # names of modules that read something else than text
PER_BLOCK = "per_layer_config"  # the config field for values of single blocks
NUMBERS = re.compile("idx|index|layer_id|layer_num|block_id|num.*layers")  # attributes: number of a block, or of all


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


def stated(text: Any, names: Iterable[str], count: int) -> dict[str, Any]:
    """Return the fields with a new count: a list gets it for every block.

    Counts that single blocks state for themselves stay in proportion; the smallest of them becomes ``count``.
    """
    values: dict[str, Any] = {}
    for name in names:
        value, own = value_of(text, name), own_fields(text)
        values[name] = [count] * len(value) if isinstance(value, list) else count
        if any(name in fields for fields in own.values()):
            least = smallest(text, name)
            values[name] = _scaled(value, count, least)
            values[PER_BLOCK] = {i: {key: _scaled(n, count, least) if key == name else n for key, n in fields.items()}
                                 for i, fields in own.items()}
    return values


def _scaled(value: int, count: int, least: int) -> int:
    if value * count % least:
        raise Unplaced(f"{value} and {least} cannot both become {count} / {least} as many")
    return value * count // least


def own_fields(text: Any) -> dict[int, dict[str, Any]]:
    """Return the fields that single blocks state differently, by the number of the block."""
    return {int(i): dict(fields) for i, fields in (text.to_dict().get(PER_BLOCK) or {}).items()}


def value_of(config: Any, name: str) -> Any:
    """Return a field of a config, for all blocks that do not state it for themselves; None where it is missing."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def smallest(text: Any, name: str) -> int:
    """Return the smallest count that a field of a config states for any block."""
    own = own_fields(text)
    stated = [fields.get(name, value_of(text, name)) for i in range(text.num_hidden_layers if own else 1)
              for fields in [own.get(i, {})]]
    return min(stated)


def stated_width(text: Any, otherwise: int) -> dict[str, int]:
    """Return the config field with the width of a head; none where the config has a width for every block."""
    try:
        return {"head_dim": getattr(text, "head_dim", None) or otherwise}
    except Exception:  # transformers has a class of its own for a field that blocks state differently
        return {}


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
