"""The modules of a stored language model without its weights, from ``config.json`` and the headers of the weight files.

transformers takes seconds to import; the sizes of a model of a family with a record can be read without it.  A folder
that states too little, or contradicts itself, has no skeleton, and transformers has to read its config.
Order of this file: skeleton · headers · modules · agreement of config and weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pruning_lib.models import families
from pruning_lib.models.language_families import FAMILIES, LanguageFamily
from pruning_lib.models.opening import OLD_BUFFERS
from pruning_lib.models.parts import tensor

OUTPUT, EMBEDDING = "lm_head", "model.embed_tokens"


class Config(SimpleNamespace):
    """The fields of a ``config.json``."""

    def get_text_config(self, decoder: bool = False) -> Config:
        """Return the config itself: the families with a record have no other parts than text."""
        return self


def skeleton(folder: Path) -> nn.Module | None:
    """Return the modules of a checkpoint on the meta device, with its config as ``config``; None where a doubt remains.

    The parameters have the names and shapes of those that transformers makes; the modules cannot be run.
    """
    try:
        fields = json.loads((folder / "config.json").read_text())
        shapes = _shapes(folder)
    except (OSError, ValueError, SafetensorError):
        return None
    family = FAMILIES[fields["model_type"]] if fields.get("model_type") in FAMILIES else None
    if family is None or not _said(fields, family, shapes):
        return None
    if fields["tie_word_embeddings"]:
        shapes.pop(f"{OUTPUT}.weight", None)
    model = _modules(shapes, family)
    width = shapes.get(f"{family.blocks}.0.{family.heads_out}.weight", (0, 0))[1]
    model.config = Config(**{"head_dim": width // fields["num_attention_heads"], **fields})  # type: ignore[assignment]
    return model if _agree(model, fields) else None


# --- headers ----------------------------------------------------------------------------------------------------------


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the weight files of a folder."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()  # noqa: SIM118
                       if not OLD_BUFFERS.search(name)}
    return shapes


def _said(fields: dict[str, Any], family: LanguageFamily, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Return whether the config states every fact that the headers lack, and gives the headers no other meaning."""
    biases = {*family.not_stored_with} if any(name.endswith(".bias") for name in shapes) else set()
    needed = {"num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
              "tie_word_embeddings", *family.heads_fixed_by, *biases}
    stated = all(name.partition(".")[0] in fields for name in needed)
    if not stated or "quantization_config" in fields or f"{family.blocks}.0.{family.heads_out}.weight" not in shapes:
        return False
    return not (family.stored_as and fields["hidden_size"] % fields["num_attention_heads"])  # opened as another family


# --- modules ----------------------------------------------------------------------------------------------------------


def _modules(shapes: dict[str, tuple[int, ...]], family: LanguageFamily) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        module = _owner(model, owner, family.blocks)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
        if leaf == "weight" and len(shape) == 2 and owner != EMBEDDING:
            module.out_features, module.in_features = shape  # type: ignore[assignment]
        module._parameters.setdefault("bias", None)
    return model


def _owner(model: nn.Module, path: str, blocks: str) -> nn.Module:
    """Return the module at ``path``, made where it is missing."""
    at, names = model, path.split(".")
    for i, name in enumerate(names):
        if name not in at._modules:
            at.add_module(name, nn.ModuleList() if ".".join(names[:i + 1]) == blocks else nn.Module())
        at = at._modules[name]  # type: ignore[assignment]
    return at


# --- agreement of config and weights ----------------------------------------------------------------------------------


def _known(family: LanguageFamily) -> Callable[[str], Any]:
    """Return a test of the name of a parameter: of a projection of the family, a norm, or an embedding."""
    layers = "|".join(map(re.escape, families.named_paths(family)))
    norms = r"model\.\w*norm|" + rf"{family.blocks}\.\d+\.(\w+\.)?\w*norm"
    return re.compile(rf"({EMBEDDING}|{OUTPUT}|{norms}|{family.blocks}\.\d+\.({layers}))\.(weight|bias)").fullmatch


def _agree(model: nn.Module, fields: dict[str, Any]) -> bool:
    """Return whether the weights have the sizes that the config states, and no parameter is missing or unknown."""
    try:
        if not all(map(_known(families.family_of(model)), dict(model.named_parameters()))):
            return False
        s, embedding = families.sizes(model), tensor(model, f"{EMBEDDING}.weight")
        output = embedding if fields["tie_word_embeddings"] else tensor(model, f"{OUTPUT}.weight")
        inside = [{name for name, _ in block.named_parameters()} for block in families.blocks(model)]
    except (AttributeError, ValueError, ZeroDivisionError, RuntimeError):
        return False
    table = (fields["vocab_size"], fields["hidden_size"])
    found = (s.blocks, s.heads, s.groups, s.neurons, tuple(embedding.shape), tuple(output.shape))
    return all(names == inside[0] for names in inside) and found == (
        fields["num_hidden_layers"], fields["num_attention_heads"],
        fields.get("num_key_value_heads") or fields["num_attention_heads"], fields["intermediate_size"], table, table)
