"""Write a checkpoint folder as one GGUF file, for llama.cpp and programs built on it.

Weights are read from the folder tensor by tensor, so a model larger than memory can be converted too.
Order of this file: tables · export · numbers of the model · weights · rotary positions.  Tokenizers are in
``gguf_tokenizer``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pruning_lib._files import replacing
from pruning_lib.models import gguf_tokenizer, gguf_types, llama_library, opening, portable
from pruning_lib.models.gguf_types import FORMATS


@dataclass(frozen=True)
class Architecture:
    """Name of a family in llama.cpp, and the differences of its computation.

    ``interleaved``: llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of queries and
    keys change places.  ``width_from_heads``: llama.cpp takes the width of a head to be width / heads, whatever the
    file says, so a model with fewer heads is written as the LLaMA that computes the same.
    """

    name: str
    interleaved: bool = False
    width_from_heads: bool = False


LLAMA = Architecture("LLAMA", interleaved=True)
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": Architecture("QWEN2", width_from_heads=True),
                 "qwen3": Architecture("QWEN3"), "phi3": Architecture("PHI3", width_from_heads=True)}


@dataclass(frozen=True)
class Exported:
    """A GGUF file and its size.

    Attributes
    ----------
    unquantised : matrices whose rows the format cannot hold, which are float16
    larger : matrices in a larger type than the format's own, since their rows are no multiple of 256
    """

    path: Path
    size_bytes: int
    unquantised: tuple[str, ...]
    larger: tuple[str, ...] = ()


def export(folder: str | Path, path: str | Path, *, format: str = "q8_0") -> Exported:
    """Write the language model in ``folder`` to ``path``; the file appears whole or not at all.

    Parameters
    ----------
    folder : with config.json, safetensors weights and a tokenizer, as ``checkpoints.save`` writes it
    format : key of ``FORMATS``; vectors are float32 in all of them.  ``"q8_0"`` holds rows in blocks of 32 numbers,
        the formats with a K in blocks of 256; a matrix with other rows gets the type that ``gguf_types`` names

    Raises
    ------
    ValueError
        before anything is written, for an unknown format, family, kind of scaled positions or kind of tokenizer.
    FileExistsError
        when there is something at ``path``.
    MissingExtra
        when the package gguf, or for a format with a K the package xllamacpp, is not installed.
    """
    gguf = gguf_tokenizer.package()
    folder, path = Path(folder), Path(path)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; allowed: {', '.join(FORMATS)}")
    if path.exists():
        raise FileExistsError(f"{path} exists; give another name or remove it first")
    if "_k" in format:
        llama_library.quantiser()
    fields = _fields(folder)
    architecture = _architecture(fields)
    vocabulary = gguf_tokenizer.read(folder, fields["vocab_size"])
    with replacing(path) as part:
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]], use_temp_file=True)
        _add_numbers(writer, fields, architecture, format)
        vocabulary.add_to(writer)
        types = _add_weights(writer, folder, fields, architecture, format)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    own = {FORMATS[format].matrix, FORMATS[format].more, FORMATS[format].embedding}
    others = {name: kind for name, kind in types.items() if kind not in own}
    return Exported(path, path.stat().st_size, tuple(name for name, kind in others.items() if kind == "F16"),
                    tuple(name for name, kind in others.items() if kind != "F16"))


def _fields(folder: Path) -> dict[str, Any]:
    """Return the config of a checkpoint with head width and rotary positions spelled out; ValueError if it cannot."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} is no checkpoint; a folder with config.json and safetensors weights is wanted")
    fields = json.loads((folder / "config.json").read_text())
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model type {kind!r} is not converted here; those that are: {', '.join(ARCHITECTURES)}. "
                         f"llama.cpp's own convert_hf_to_gguf.py reads {folder} too")
    config = portable.completed(opening.config_of(str(folder)))
    stated = config.to_dict()
    rotary = stated.get("rope_parameters") or portable.new_rotary(stated)["rope_parameters"]
    if rotary["rope_type"] not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise ValueError(f"scaled positions of type {rotary['rope_type']!r} have no place in a GGUF file")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {**config.to_dict(), "rotary": rotary, "head_dim": width, "num_key_value_heads": groups}


def _architecture(fields: dict[str, Any]) -> Architecture:
    """Return the architecture under which llama.cpp and transformers give the same logits."""
    own = ARCHITECTURES[fields["model_type"]]
    stated = fields["num_attention_heads"] * fields["head_dim"] != fields["hidden_size"]
    return LLAMA if own.width_from_heads and stated else own


def _add_numbers(writer: Any, fields: dict[str, Any], architecture: Architecture, format: str) -> None:
    """Write sizes and constants.  Head width always: left out, it would be taken to be width / heads."""
    gguf = gguf_tokenizer.package()
    if fields["model_type"] == "phi3" and architecture is LLAMA:
        writer.add_name("phi-3")  # llama.cpp concludes from it that special tokens swallow the space behind them
    writer.add_file_type(gguf.LlamaFileType[FORMATS[format].file_type])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])
    _add_rotary(writer, fields)
    if architecture.name == "PHI3":
        writer.add_sliding_window(fields.get("sliding_window") or 0)


# --- weights ----------------------------------------------------------------------------------------------------------


def _add_weights(writer: Any, folder: Path, fields: dict[str, Any], architecture: Architecture, format: str
                 ) -> dict[str, str]:
    """Add every tensor under llama.cpp's name; return the type of every matrix by its name in the checkpoint."""
    gguf = gguf_tokenizer.package()
    blocks, tied = fields["num_hidden_layers"], bool(fields.get("tie_word_embeddings"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], blocks)
    types = {}
    for name, tensor in _tensors(folder, fields if architecture is LLAMA else {}):
        if name == "lm_head.weight" and tied:
            continue
        if architecture.interleaved and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            tensor = _interleaved(tensor, fields["head_dim"])
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ValueError(f"llama.cpp has no place for the weight {name} in a {fields['model_type']} model")
        kind = "F32"
        if tensor.ndim > 1:
            kind = types[name] = gguf_types.type_of(mapped, tensor.shape[-1], format, blocks=blocks, tied=tied)
        writer.add_tensor(mapped, gguf_types.quantise(tensor.float().numpy(), kind),
                          raw_dtype=gguf.GGMLQuantizationType[kind])
    for mapped, tensor in _rotary_factors(fields):
        writer.add_tensor(mapped, tensor.float().numpy())
    return types


def _tensors(folder: Path, fields: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of a folder by name; given the ``fields`` of a config, fused ones taken apart."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in sorted(file.keys()):
                yield from _apart(name, file.get_tensor(name), fields)


def _apart(name: str, tensor: Tensor, fields: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the projections that Phi-3 keeps in one matrix; any other weight as it is."""
    fused = {".qkv_proj.": [("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"),
                            ("v_proj", "num_key_value_heads")],
             ".gate_up_proj.": [("gate_proj", "intermediate_size"), ("up_proj", "intermediate_size")]}
    key = next((key for key in fused if fields and key in name), None)
    if key is None:
        yield name, tensor
        return
    width = fields["head_dim"] if key == ".qkv_proj." else 1
    rows = tensor.split([fields[count] * width for _, count in fused[key]])
    for (part, _), own in zip(fused[key], rows, strict=True):
        yield name.replace(key, f".{part}."), own


def _interleaved(rows: Tensor, D: int) -> Tensor:
    """Return the rows of a projection, or its bias, with the two halves of every head merged like a zip fastener."""
    return rows.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).reshape(rows.shape)


# --- rotary positions -------------------------------------------------------------------------------------------------


def _add_rotary(writer: Any, fields: dict[str, Any]) -> None:
    gguf = gguf_tokenizer.package()
    rotary = fields["rotary"]
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    writer.add_rope_dimension_count(int(fields["head_dim"] * rotary.get("partial_rotary_factor", 1)))
    original = rotary.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    if fields["model_type"] == "phi3":  # llama.cpp wants it there in any case
        writer.add_rope_scaling_orig_ctx_len(original or fields["max_position_embeddings"])
    if rotary["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rotary["rope_type"].upper()])
        writer.add_rope_scaling_factor(float(rotary["factor"]))
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original or fields["max_position_embeddings"])
        for name, add in (("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                          ("beta_slow", writer.add_rope_scaling_yarn_beta_slow)):
            if rotary.get(name) is not None:
                add(float(rotary[name]))
    if rotary["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_attention(fields, original))


def _longrope_attention(fields: dict[str, Any], original: Any) -> float:
    """Return the factor of queries and keys for long-context factors (Phi-3)."""
    stated, scale = fields["rotary"].get("attention_factor"), fields["max_position_embeddings"] / original
    if stated:
        return float(stated)
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _rotary_factors(fields: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the divisors of the rotary frequencies, (D / 2,), where the positions are scaled frequency by frequency."""
    rotary = fields["rotary"]
    if rotary["rope_type"] == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(rotary[f"{length}_factor"])
    if rotary["rope_type"] == "llama3":
        D, factor = fields["head_dim"], rotary["factor"]
        low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
        frequency = rotary["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        turns = rotary["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", 1 / ((1 - smooth) / factor + smooth)
