"""Toy networks of any causal model type of transformers: for tests, for exercises, for the page of model types.

Sizes of the default config are made small field by field.  Types whose fields depend on each other in a way of their
own have an entry in ``EXTRA``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pruning_lib.models.growth import text_config
from pruning_lib.models.language_families import FAMILIES
from pruning_lib.models.parameter_counts import parameter_count

# field -> size; the first group is set wherever the config class has the field, the second where it has a value
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "n_positions": 128,
    "num_hidden_layers": 2, "num_layers": 2, "n_layers": 2,
    "n_layer": 2, "decoder_layers": 2, "encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_layers": 1,
    "intermediate_size": 24, "ffn_dim": 24, "n_inner": 24, "d_inner": 24, "ffn_hidden_size": 24, "inner_dim": 24,
    "dff": 24, "dim_ff": 24,
    "decoder_ffn_dim": 24, "encoder_ffn_dim": 24, "num_attention_heads": 4, "num_heads": 4, "n_heads": 4, "n_head": 4,
    "attention_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2}
OTHER = {
    "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "shared_experts_intermediate_size": 28,
    "intermediate_size_mlp": 24, "dense_intermediate_size": 24, "shared_intermediate_size": 28,
    "prefix_dense_intermediate_size": 24, "expert_ffn_hidden_size": 20, "moe_shared_expert_intermediate_size": 28,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "num_experts_per_token": 2, "n_shared_experts": 1,
    "zero_expert_num": 0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 8,
    "index_n_heads": 2, "rotary_dim": 8, "sliding_window": 64, "sliding_window_size": 64, "attention_window_size": 64,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "state_size": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "lru_width": 32,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "embedding_size": 32, "type_vocab_size": 2}
# sub-config -> fields, of multimodal types whose parts depend on each other
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3n": {"vision_config": {"architecture": "test_efficientnet"}, "audio_config": {"hidden_size": 32,
                "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4}},
    "dots3_note": {"vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_local_experts": 2,
                                     "moe_intermediate_size": 20},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16}},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 28, "crop_size": 28, "image_token_id": 62},
        "audio_config": {"hidden_size": 32, "intermediate_size": 24, "num_blocks": 1, "num_attention_heads": 4,
                         "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16,
                         "bias_max_distance": 16, "audio_token_id": 63}},
}
SMALL_BYTES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
BESIDE["blt"] = {"patcher_config": SMALL_BYTES, "global_config": {**SMALL_BYTES, "hidden_size": 64},
                 **dict.fromkeys(("encoder_config", "decoder_config"), {**SMALL_BYTES, "hidden_size_global": 64})}
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}  # with latent attention every head has keys of its own
QWEN4 = {"layer_types": ["linear_attention", "full_attention"], "hc_lowrank": 8, "ngram_vocab_size_base": 97,
         "split_ngram_parts": 1, "heads_per_ngram": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
         "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4}
GEMMA3N = {"num_kv_shared_layers": 0, "intermediate_size": [24, 24], "activation_sparsity_pattern": [0.5, 0.0]}
GEMMA4 = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
EXTRA: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3n": GEMMA3N, "gemma3n_text": GEMMA3N,
    **dict.fromkeys(GEMMA4, {"num_kv_shared_layers": 0, "global_head_dim": 16}),
    "xlm": {"n_words": 64, "max_position_embeddings": 128},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
              "moe_intermediate_size": 20},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                                for kind in ("full_attention", "sliding_attention")}},
    "git": {"vision_config": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1,
                              "num_attention_heads": 4, "image_size": 32, "patch_size": 16}},
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "bert": {"is_decoder": True}, "roberta": {"is_decoder": True},
    "falcon": {"new_decoder_architecture": True},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64, "pronunciation_embed_dim": 32,
                 "shape_embed_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "bamba": {"attn_layer_indices": [1]}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["full_attention", "linear_attention"]},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention", "mlp"], "n_groups": 2,
                   "mamba_head_dim": 16},
    "youtu": {"pad_token_id": None},  # transformers sets the row of a padding token to zero when it loads this type
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "qwen4_exp_text": QWEN4, "qwen4_exp": QWEN4,
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4},
}


def toy_config(name: str, **sizes: int) -> Any:
    """Return the config of a toy network of model type ``name``.

    Parameters
    ----------
    sizes : config fields beyond ``COMMON`` and ``OTHER``

    Raises
    ------
    Exception
        of any kind, when the config class does not accept these small sizes.
    """
    from transformers import AutoConfig

    default = AutoConfig.for_model(name)
    text = text_config(default)
    extra = FAMILIES[name].tiny if name in FAMILIES else EXTRA.get(name, {})
    fields = {**_fields(text), **extra, **sizes}
    beside = BESIDE.get(name, {})
    if text is default:
        return AutoConfig.for_model(name, **fields, **beside)
    parts = {}
    for key in default.sub_configs:
        part = getattr(default, key, None)
        if part is not None:
            small = fields if part is text else _fields(part)
            parts[key] = {**small, **beside.get(key, {}), "model_type": part.model_type}
    return AutoConfig.for_model(name, **parts)


def _fields(config: Any) -> dict[str, Any]:
    """Return small values for the fields that a config has, lists with an entry per block cut to the first and last."""
    known = config.to_dict()
    wanted = {**COMMON, **{k: v for k, v in OTHER.items() if known.get(k) is not None}}
    if known.get("kv_lora_rank") is not None:
        wanted |= LATENT
    lists = {k: [v[0], v[-1]] for k, v in known.items() if isinstance(v, list) and "layer" in k and len(v) > 2}
    return {k: v for k, v in wanted.items() if k in known} | lists


def toy(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, most_parameters: int = 20_000_000,
        **sizes: int) -> nn.Module:
    """Return a toy network of model type ``name`` in which no parameter is zero.

    Raises
    ------
    ValueError
        when the network would still have more than ``most_parameters``.
    """
    from transformers import AutoModelForCausalLM

    config = toy_config(name, **sizes)
    with torch.device("meta"):
        count = parameter_count(AutoModelForCausalLM.from_config(config))
    if count > most_parameters:
        raise ValueError(f"a toy network of type {name!r} still has {count:,} parameters")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, none of them zero, so that a wrong slice or a dropped bias shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = "norm" in name and name.endswith("weight")
        parameter.data.copy_(1 + 0.2 * noise if scale else 0.25 * noise)
