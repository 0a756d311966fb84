"""Families of language models: where the blocks, heads and neurons are.

One record per family states only what the model's own config cannot tell; sizes are read from the modules.
To add a family, add one entry to ``FAMILIES``; the tests run over the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pruning_lib.registry import Table


@dataclass(frozen=True)
class LanguageFamily:
    """Where things are in one family of decoder-only language models.

    ``blocks`` is a path from the model; the other paths start inside one block.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    heads_out: str = "self_attn.o_proj"  # takes the heads back to the residual stream
    neurons_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    neurons_out: str = "mlp.down_proj"  # closes the MLP
    # config fields whose truth makes head removal impossible, with the reason
    heads_fixed_by: Mapping[str, str] = field(default_factory=dict)
    # where transformers refuses head counts that do not divide the width: the family that stores the same network ...
    stored_as: str | None = None
    # ... as long as none of these config fields is set (that family has no place for them)
    not_stored_with: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)  # config of a toy network beyond the common sizes


FAMILIES: Table = Table("family")
FAMILIES["llama"] = LanguageFamily(stored_as="mistral", not_stored_with=("attention_bias", "mlp_bias"))
FAMILIES["mistral"] = LanguageFamily(tiny={"sliding_window": None})
FAMILIES["qwen2"] = LanguageFamily()
FAMILIES["qwen3"] = LanguageFamily()
FAMILIES["phi"] = LanguageFamily(
    heads_out="self_attn.dense",
    neurons_in=("mlp.fc1",),
    neurons_out="mlp.fc2",
    heads_fixed_by={"qk_layernorm": "its query/key norm is sized as width / heads when the model is loaded"},
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model, read from its modules; the same in every block."""

    blocks: int  # L
    heads: int  # H
    groups: int  # G
    head_width: int  # D
    neurons: int  # M
    width: int  # C
    head_parameters: int  # of one query head: its rows of the query, its columns of the output projection
    group_parameters: int  # of one key/value pair, without its queries
    neuron_parameters: int
    parameters: int  # of the whole model, shared ones counted once


def of(model: nn.Module) -> LanguageFamily:
    """The family record of a transformers model.

    Raises
    ------
    ValueError
        for a model type that has no record, or whose modules are not where the record says.
    """
    family = FAMILIES[getattr(getattr(model, "config", None), "model_type", type(model).__name__)]
    for path in (family.blocks, *(f"{family.blocks}.0.{p}" for p in _projections(family))):
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{type(model).__name__} has no {path!r}: give the causal language model as transformers "
                f"loads it (AutoModelForCausalLM), not a wrapper or a part of it"
            ) from None
    return family


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks."""
    return model.get_submodule(of(model).blocks)


def sizes(model: nn.Module) -> Sizes:
    """Read the sizes off the modules of ``model``.

    Raises
    ------
    ValueError
        when blocks differ in size: a plan removes the same number in every block.
    """
    family, found = of(model), set()
    D = head_width(model)
    for block in blocks(model):
        q, k, v = (block.get_submodule(p) for p in (family.queries, family.keys, family.values))
        out, down = block.get_submodule(family.heads_out), block.get_submodule(family.neurons_out)
        H, G, M = q.out_features // D, k.out_features // D, down.in_features
        head = _rows(q, D) + D * out.out_features
        group = _rows(k, D) + _rows(v, D)
        neuron = sum(_rows(block.get_submodule(p), 1) for p in family.neurons_in) + down.out_features
        found.add((H, G, M, out.out_features, head, group, neuron))
    if len(found) != 1:
        raise ValueError(f"blocks differ in size ({len(found)} kinds); plans need the same sizes in every block")
    H, G, M, C, head, group, neuron = found.pop()
    total = sum(p.numel() for p in model.parameters())
    return Sizes(len(blocks(model)), H, G, D, M, C, head, group, neuron, total)


def head_width(model: nn.Module) -> int:
    """``D``, from the config where it is stated, else width / heads."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def refuse_head_count(model: nn.Module, heads: int) -> None:
    """Raise ValueError, naming the allowed counts, if a model with ``heads`` per block could not be stored.

    transformers from 5.4 on refuses LLaMA configs whose head count does not divide the width.  Such a model is stored
    under the family's ``stored_as``; only where that has no place for what the config asks is the count refused.
    """
    family, config = of(model), model.config
    H = blocks(model)[0].get_submodule(family.queries).out_features // head_width(model)
    for name, reason in family.heads_fixed_by.items():
        if heads != H and getattr(config, name, False):
            raise ValueError(f"heads of this model cannot be removed ({name}: {reason}); use scope='neurons'")
    in_the_way = [name for name in family.not_stored_with if getattr(config, name, False)]
    if in_the_way and config.hidden_size % heads:
        G = blocks(model)[0].get_submodule(family.keys).out_features // head_width(model)
        lossless = {*range(H // G, H + 1, H // G), *range(G, H + 1, G)}  # whole groups, equal queries
        allowed = sorted(h for h in lossless if config.hidden_size % h == 0)
        raise ValueError(
            f"{heads} heads per block could not be stored: with {', '.join(in_the_way)} the count must divide the "
            f"width {config.hidden_size}. Allowed: {allowed}; or use scope='neurons'"
        )


def tiny(name: str, *, n_blocks: int = 2, heads: int = 4, groups: int = 2, head_width: int = 8, neurons: int = 24,
         width: int = 32, vocabulary: int = 64) -> Any:
    """Config of a toy network of family ``name``, for tests and for exercises."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        name, vocab_size=vocabulary, hidden_size=width, intermediate_size=neurons, num_hidden_layers=n_blocks,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[name].tiny,
    )
    config.head_dim = head_width  # Phi and Qwen2 do not declare it but honour it when set
    return config


def _projections(family: LanguageFamily) -> tuple[str, ...]:
    return (family.queries, family.keys, family.values, family.heads_out, *family.neurons_in, family.neurons_out)


def _rows(linear: nn.Linear, n: int) -> int:
    """Parameters in ``n`` output rows of a linear layer, biases included."""
    return n * (linear.in_features + (linear.bias is not None))
