"""Conversion of a LLaMA into an equivalent Phi-3, which stores the same weights in fused matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FUSED = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}  # fused matrix: its parts
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id")


def as_phi3(llama: nn.Module) -> nn.Module:
    """Return a Phi-3 with the weights of ``llama`` and the same logits up to rounding.

    Raises
    ------
    ValueError
        for another family, or a LLaMA with biases, which Phi-3 does not have.
    """
    from transformers import AutoModelForCausalLM, Phi3Config

    config: Any = llama.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"a {config.model_type} with these fields has no equivalent Phi-3; give a LLaMA "
                         f"without biases")
    fields = {"head_dim": config.head_dim, "sliding_window": None, **{name: getattr(config, name) for name in SAME}}
    wanted = Phi3Config(**fields)
    model: Any = AutoModelForCausalLM.from_config(wanted, dtype=next(llama.parameters()).dtype).eval()
    weights = dict(llama.state_dict())
    for i in range(config.num_hidden_layers):
        for fused, parts in FUSED.items():
            weights[f"model.layers.{i}.{fused}.weight"] = torch.cat(
                [weights.pop(f"model.layers.{i}.{part}.weight") for part in parts])
    model.load_state_dict(weights)
    return model
