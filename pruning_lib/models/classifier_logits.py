"""Predictions of a language model from the input of its classifier, without running the model again."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits (..., vocabulary) of a language model from the input of its classifier, (..., C).

    In most families they are the output of the classifier; Granite divides it, Gemma 2 caps it softly.
    """
    found: Tensor = cast(Any, model).get_output_embeddings()(hidden)
    divisor, cap = (getattr(model.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
    if divisor:
        found = found / divisor
    return cap * torch.tanh(found / cap) if cap else found


@torch.no_grad()
def logits_known(model: nn.Module) -> bool:
    """Return True if ``logits`` agrees with the forward pass of the model on two tokens."""
    network = cast(Any, model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=network.device)
    expected = network(input_ids=ids, use_cache=False).logits
    found = logits(model, network.base_model(input_ids=ids, use_cache=False).last_hidden_state).to(expected.device)
    return bool((found - expected).abs().max() <= 0.01 * expected.abs().max())
