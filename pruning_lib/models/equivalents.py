"""Networks of types whose head width is always width / heads, written as equal networks of a type that states its own.

With fewer heads, transformers would make each head of such a type wider, so its heads cannot be removed.  The same
function is computed by a Phi (attention and MLP side by side), a Nemotron (one after the other) or a Mistral network,
whose config states the head width.  Fused matrices are taken apart, rotary pairs are put into the order of the other
type, and two norms of one input become one by moving their weights into the matrices behind them.
To add a type, add one entry to ``EQUIVALENTS``; the tests run over the table.
Order of this file: networks in parts · types that are read · types that are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning_lib.models import offload, portable
from pruning_lib.models.growth import text_config

Affine = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out,) of a linear layer; weight and bias of a norm
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Block:
    """Weights of one block; ``second_norm`` is None where the MLP takes the same input as the attention."""

    norm: Affine
    second_norm: Affine | None
    queries: Affine  # (H*D, C), rotary pairs half a rotation apart
    keys: Affine  # (G*D, C)
    values: Affine
    heads_out: Affine  # (C, H*D)
    neurons_in: Affine  # (M, C)
    neurons_out: Affine  # (C, M)


@dataclass(frozen=True)
class Parts:
    """A decoder in parts: one list entry per block, and the fields that all types state under the same names."""

    blocks: list[Block]
    final_norm: Affine
    side_by_side: bool  # attention and MLP take the same input
    fields: dict[str, Any]
    epsilon: float


@dataclass(frozen=True)
class Equivalent:
    """Holds the conversion of networks of one type to another.

    Attributes
    ----------
    convert : function of the model that returns the equal network
    heads_out, neurons_out : paths, within a block of the type, of the output projections of attention and MLP
    """

    convert: Callable[[Any], nn.Module]
    heads_out: str
    neurons_out: str


def entry(model: nn.Module) -> Equivalent | None:
    """Return how a network is written as one of another type; None for types that need no other, or have none."""
    config = getattr(model, "config", None)
    return EQUIVALENTS.get(getattr(config, "model_type", ""))


def with_head_width(model: nn.Module) -> nn.Module:
    """Return the equal network of a type that states its head width; the model itself where no such type is known.

    Logits agree up to the rounding of the dtype.  Weights that both types store alike are shared with ``model``.

    Raises
    ------
    ValueError
        for a setting that the other type has no place for, and for weights that are offloaded.
    """
    found = entry(model)
    if found is None:
        return model
    if offload.is_offloaded(model):
        raise ValueError("weights of this model are offloaded, so it cannot be written as another type, which removing "
                         "its heads needs; load it on one device, or remove neurons only")
    return found.convert(model)


# --- networks in parts ------------------------------------------------------------------------------------------------


def _affine(layer: Any) -> Affine:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _rows(affine: Affine, rows: Tensor) -> Affine:
    weight, bias = affine
    rows = rows.flatten().to(weight.device)
    return weight[rows], None if bias is None else bias[rows]


def _halves(affine: Affine, D: int, rotated: int) -> Affine:
    """Return rows of queries or keys with rotary pairs (0, 1), (2, 3) .. put at (0, r/2), (1, r/2 + 1) .."""
    order = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, D)])
    return _rows(affine, torch.arange(len(affine[0])).view(-1, D)[:, order])


def _behind(norm: Affine, linear: Affine) -> Affine:
    """Return a linear layer that takes the output of the bare norm, without the norm's own weight and bias."""
    (scale, shift), (weight, bias) = norm, linear
    exact = weight.double()
    moved = torch.zeros(len(weight), dtype=torch.float64, device=weight.device) if bias is None else bias.double()
    moved = moved if shift is None else moved + exact @ shift.double()
    return (exact * scale.double()).to(weight.dtype), moved.to(weight.dtype)


def _one_norm(block: Block) -> tuple[Affine, Affine, Affine, Affine, Affine]:
    """Return the norm before attention and MLP, and queries, keys, values and the MLP's first layer behind it."""
    if block.second_norm is None:
        return block.norm, block.queries, block.keys, block.values, block.neurons_in
    bare = torch.ones_like(block.norm[0]), torch.zeros_like(block.norm[0])
    q, k, v = (_behind(block.norm, linear) for linear in (block.queries, block.keys, block.values))
    return bare, q, k, v, _behind(block.second_norm, block.neurons_in)


def _fields(model: Any, first: Block, D: int, activation: str, rotary: dict[str, Any]) -> dict[str, Any]:
    config = text_config(model.config)
    same = {name: getattr(config, name, None) for name in TOKENS}
    return {**same, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers, "intermediate_size": len(first.neurons_in[0]),
            "num_attention_heads": len(first.queries[0]) // D, "num_key_value_heads": len(first.keys[0]) // D,
            "max_position_embeddings": config.max_position_embeddings, "hidden_act": activation,
            "tie_word_embeddings": bool(config.tie_word_embeddings), "head_dim": D,
            "rope_parameters": rotary, **portable.rotary({"rope_parameters": rotary})}


def _rotary(config: Any, partial: float) -> dict[str, Any]:
    """Return the rotary positions of a config, with the share of a head that is rotated."""
    known = dict(getattr(config, "rope_parameters", None) or {})
    base = known.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    return {"rope_type": "default", **known, "rope_theta": base, "partial_rotary_factor": partial}


# --- types that are read ----------------------------------------------------------------------------------------------


def _gpt_neox(model: Any) -> nn.Module:
    """Convert a GPT-NeoX, in which every head has its query, key and value rows together."""
    config, base = model.config, model.base_model
    H = config.num_attention_heads
    D = config.hidden_size // H
    rows = torch.arange(3 * H * D).view(H, 3, D)
    blocks = []
    for layer in base.layers:
        q, k, v = (_rows(_affine(layer.attention.query_key_value), rows[:, i]) for i in range(3))
        out = layer.attention.dense.weight.detach(), getattr(layer.attention, "dense_bias", layer.attention.dense.bias)
        blocks.append(Block(_affine(layer.input_layernorm), _affine(layer.post_attention_layernorm), q, k, v, out,
                            _affine(layer.mlp.dense_h_to_4h), _affine(layer.mlp.dense_4h_to_h)))
    known = getattr(config, "rope_parameters", None) or {}
    partial = known.get("partial_rotary_factor", getattr(config, "rotary_pct", 1.0))
    parts = Parts(blocks, _affine(base.final_layer_norm), getattr(config, "use_parallel_residual", False),
                  _fields(model, blocks[0], D, config.hidden_act, _rotary(config, partial)), config.layer_norm_eps)
    return _written(model, parts)


def _gptj(model: Any) -> nn.Module:
    """Convert a GPT-J, whose rotary pairs lie side by side."""
    def split(attention: Any, D: int) -> list[Affine]:
        return [_affine(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]

    return _rotating_pairs(model, split)


def _codegen(model: Any) -> nn.Module:
    """Convert a CodeGen, whose queries, values and keys are fused in four pieces."""
    def split(attention: Any, D: int) -> list[Affine]:
        rows = torch.arange(len(attention.qkv_proj.weight)).view(4, 3, -1)
        return [_rows(_affine(attention.qkv_proj), rows[:, i]) for i in (0, 2, 1)]

    return _rotating_pairs(model, split)


def _rotating_pairs(model: Any, split: Callable[[Any, int], list[Affine]]) -> nn.Module:
    config, base = model.config, model.base_model
    D = config.hidden_size // config.num_attention_heads
    if not config.rotary_dim or config.rotary_dim > D:
        raise ValueError(f"rotary_dim={config.rotary_dim} with heads of width {D}: no other type rotates as many")
    blocks = []
    for layer in base.h:
        q, k, v = split(layer.attn, D)
        blocks.append(Block(_affine(layer.ln_1), None, _halves(q, D, config.rotary_dim),
                            _halves(k, D, config.rotary_dim), v, _affine(layer.attn.out_proj),
                            _affine(layer.mlp.fc_in), _affine(layer.mlp.fc_out)))
    fields = _fields(model, blocks[0], D, config.activation_function, _rotary(config, config.rotary_dim / D))
    return _written(model, Parts(blocks, _affine(base.ln_f), True, fields, config.layer_norm_epsilon))


def _falcon(model: Any) -> nn.Module:
    """Convert a Falcon, in which each group has the rows of its queries, then its key, then its value."""
    config, base = model.config, model.base_model
    if config.alibi or (config.new_decoder_architecture and not config.parallel_attn):
        raise ValueError("this Falcon has positions as a bias of the attention scores (alibi), or blocks in sequence "
                         "of the new kind; no other type that states a head width has them")
    H = config.num_attention_heads
    D = config.hidden_size // H
    G = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else H
    rows = torch.arange((H + 2 * G) * D).view(G, H // G + 2, D)
    blocks = []
    for layer in base.h:
        fused = _affine(layer.self_attention.query_key_value)
        q, k, v = (_rows(fused, part) for part in (rows[:, :-2], rows[:, -2], rows[:, -1]))
        first, second = _falcon_norms(layer)
        blocks.append(Block(first, second, q, k, v, _affine(layer.self_attention.dense),
                            _affine(layer.mlp.dense_h_to_4h), _affine(layer.mlp.dense_4h_to_h)))
    fields = _fields(model, blocks[0], D, config.activation, _rotary(config, 1.0))
    return _written(model, Parts(blocks, _affine(base.ln_f), config.parallel_attn, fields, config.layer_norm_epsilon))


def _falcon_norms(layer: Any) -> tuple[Affine, Affine | None]:
    if hasattr(layer, "ln_attn"):
        return _affine(layer.ln_attn), _affine(layer.ln_mlp)
    second = getattr(layer, "post_attention_layernorm", None)
    return _affine(layer.input_layernorm), None if second is None else _affine(second)


def _helium(model: Any) -> nn.Module:
    """Convert a Helium, a Mistral whose rotary pairs lie side by side."""
    config = model.config
    if config.attention_bias or config.mlp_bias:
        raise ValueError("this Helium has biases in its attention or its MLP, Mistral has no place for them")
    D = config.head_dim
    weights = dict(model.state_dict())
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        weights[name] = _halves((weights[name], None), D, D)[0]
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
            *TOKENS)
    rotary = _rotary(config, 1.0)
    fields = {name: getattr(config, name) for name in same}
    return _built("mistral", model, {**fields, "head_dim": D, "sliding_window": None, "rope_parameters": rotary,
                                     **portable.rotary({"rope_parameters": rotary})}, weights)


# --- types that are written -------------------------------------------------------------------------------------------


def _written(model: Any, parts: Parts) -> nn.Module:
    """Return a decoder in parts as a Phi or a Nemotron network."""
    weights = dict(_phi(model, parts) if parts.side_by_side else _nemotron(model, parts))
    if parts.side_by_side:
        return _built("phi", model, {**parts.fields, "layer_norm_eps": parts.epsilon}, weights)
    biases = {"attention_bias": any("_proj.bias" in name and "attn" in name for name in weights),
              "mlp_bias": any("_proj.bias" in name and "mlp" in name for name in weights)}
    return _built("nemotron", model, {**parts.fields, **biases, "norm_eps": parts.epsilon}, weights)


def _phi(model: Any, parts: Parts) -> Iterator[tuple[str, Tensor]]:
    yield from _ends(model, "model.final_layernorm", parts.final_norm, always_bias=True)
    for i, block in enumerate(parts.blocks):
        norm, q, k, v, neurons_in = _one_norm(block)
        yield from _named(f"model.layers.{i}.input_layernorm", norm, True)
        for name, affine in (("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v),
                             ("self_attn.dense", block.heads_out), ("mlp.fc1", neurons_in),
                             ("mlp.fc2", block.neurons_out)):
            yield from _named(f"model.layers.{i}.{name}", affine, True)


def _nemotron(model: Any, parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a Nemotron network, whose norms store their weight less one."""
    yield from _ends(model, "model.norm", _less_one(parts.final_norm), always_bias=False)
    attention = any(affine[1] is not None for block in parts.blocks
                    for affine in (block.queries, block.keys, block.values, block.heads_out))
    mlp = any(affine[1] is not None for block in parts.blocks for affine in (block.neurons_in, block.neurons_out))
    for i, block in enumerate(parts.blocks):
        assert block.second_norm is not None  # blocks in sequence have two
        yield from _named(f"model.layers.{i}.input_layernorm", _less_one(block.norm), True)
        yield from _named(f"model.layers.{i}.post_attention_layernorm", _less_one(block.second_norm), True)
        for name, affine in (("q", block.queries), ("k", block.keys), ("v", block.values), ("o", block.heads_out)):
            yield from _named(f"model.layers.{i}.self_attn.{name}_proj", affine, attention)
        for name, affine in (("up", block.neurons_in), ("down", block.neurons_out)):
            yield from _named(f"model.layers.{i}.mlp.{name}_proj", affine, mlp)


def _less_one(norm: Affine) -> Affine:
    return norm[0] - 1, norm[1]


def _ends(model: Any, norm: str, final: Affine, *, always_bias: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the embeddings, the last norm and the output layer."""
    head = model.get_output_embeddings()
    if head.bias is not None and not always_bias:
        raise ValueError("the output layer of this model has a bias, Nemotron has no place for it")
    yield "model.embed_tokens.weight", model.get_input_embeddings().weight.detach()
    yield from _named(norm, final, True)
    yield from _named("lm_head", _affine(head), always_bias)


def _named(name: str, affine: Affine, with_bias: bool) -> Iterator[tuple[str, Tensor]]:
    weight, bias = affine
    yield f"{name}.weight", weight
    if with_bias:
        yield f"{name}.bias", weight.new_zeros(len(weight)) if bias is None else bias.detach()


def _built(kind: str, model: Any, fields: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Return a network of type ``kind`` with these weights, on the device and in the mode of ``model``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **fields)
    config.head_dim = fields["head_dim"]  # Phi does not declare it but honours it when set
    device = next(model.parameters()).device
    with torch.device("meta" if device.type == "meta" else "cpu"):
        written: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    written.load_state_dict(weights, assign=True)
    written.tie_weights()
    written.generation_config = model.generation_config
    if hasattr(model, "stored_dtype"):
        written.stored_dtype = model.stored_dtype
    return cast(nn.Module, written.to(device).train(model.training))


EQUIVALENTS = {
    "gpt_neox": Equivalent(_gpt_neox, "attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox_japanese": Equivalent(_gpt_neox, "attention.dense", "mlp.dense_4h_to_h"),
    "gptj": Equivalent(_gptj, "attn.out_proj", "mlp.fc_out"),
    "codegen": Equivalent(_codegen, "attn.out_proj", "mlp.fc_out"),
    "falcon": Equivalent(_falcon, "self_attention.dense", "mlp.dense_4h_to_h"),
    "helium": Equivalent(_helium, "self_attn.o_proj", "mlp.down_proj"),
}
