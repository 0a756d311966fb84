"""Configs of published language models, for plans without a download.

A model on PyTorch's ``meta`` device has shapes but needs no memory: plans, parameter counts and limits can be computed
for it.  With random weights it is as fast as the published model, since speed does not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pruning_lib._registry import Table


@dataclass(frozen=True)
class PublishedConfig:
    """Config fields that determine the size of a language model.

    Attributes
    ----------
    family : key of ``families.FAMILIES``
    groups : key/value heads; the number of heads if attention is not grouped
    parameters : published number of parameters, tied embeddings counted once
    more : further fields of the config
    """

    family: str
    blocks: int
    width: int
    heads: int
    groups: int
    neurons: int
    vocabulary: int
    parameters: int
    more: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED_CONFIGS: Table = Table("shape")  # by hub name
PUBLISHED_CONFIGS["meta-llama/Llama-2-7b-hf"] = PublishedConfig("llama", 32, 4096, 32, 32, 11008, 32000, 6_738_415_616)
PUBLISHED_CONFIGS["meta-llama/Llama-3.2-1B"] = PublishedConfig("llama", 16, 2048, 32, 8, 8192, 128256, 1_235_814_400,
                                                               {"head_dim": 64, "tie_word_embeddings": True})
PUBLISHED_CONFIGS["meta-llama/Llama-3.1-70B"] = PublishedConfig("llama", 80, 8192, 64, 8, 28672, 128256, 70_553_706_496)
PUBLISHED_CONFIGS["Qwen/Qwen2.5-0.5B"] = PublishedConfig("qwen2", 24, 896, 14, 2, 4864, 151936, 494_032_768,
                                                       {"tie_word_embeddings": True})
PUBLISHED_CONFIGS["microsoft/phi-1"] = PublishedConfig("phi", 24, 2048, 32, 32, 8192, 51200, 1_418_270_720,
                                                       {"partial_rotary_factor": 0.5})
PUBLISHED_CONFIGS["microsoft/phi-1_5"] = PUBLISHED_CONFIGS["microsoft/phi-1"]
PUBLISHED_CONFIGS["microsoft/phi-2"] = PublishedConfig("phi", 32, 2560, 32, 32, 10240, 51200, 2_779_683_840,
                                                       {"partial_rotary_factor": 0.4})


def random_model(name: str, *, device: str = "meta", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """Return a model with the config ``name`` (key of ``PUBLISHED_CONFIGS``) and random weights, none on ``meta``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = PUBLISHED_CONFIGS[name]
    config = AutoConfig.for_model(
        shape.family, num_hidden_layers=shape.blocks, hidden_size=shape.width, num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups, intermediate_size=shape.neurons, vocab_size=shape.vocabulary,
        **{"tie_word_embeddings": False, **shape.more})
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
