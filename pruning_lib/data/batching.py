"""Batches: texts as padded tensors of token numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def batches(prompts: Sequence[str], tokenizer: Any, *, tokens_per_batch: int = 1024, max_length: int = 512
            ) -> list[dict[str, Tensor]]:
    """Tokenise prompts into padded batches of similar length, longest first.

    Parameters
    ----------
    prompts : texts
    tokens_per_batch : largest padded size B x T of a batch; larger batches are faster up to the size of the cache, and
        need more memory
    max_length : number of tokens after which a prompt is truncated

    Returns
    -------
    list of dicts with ``input_ids`` and ``attention_mask``, each (B, T)

    Raises
    ------
    ValueError
        without a tokenizer (image networks have none), without prompts, or for a prompt without tokens.
    """
    if tokenizer is None:
        raise ValueError("no tokenizer: AMP prunes language models; whole blocks of an image network are removed by "
                         "consensus.prune and the notebook consensus_prune")
    if not prompts:
        raise ValueError("no prompts: give at least one text to calibrate on")
    encoded = [tokenizer(p, truncation=True, max_length=max_length)["input_ids"] for p in prompts]
    if not all(encoded):
        raise ValueError("a prompt has no tokens; drop empty texts")
    encoded.sort(key=len, reverse=True)
    result = []
    while encoded:
        B = max(1, tokens_per_batch // len(encoded[0]))
        result.append(_pad(encoded[:B], tokenizer.pad_token_id or 0))
        encoded = encoded[B:]
    return result


def bos_token(tokenizer: Any) -> int | None:
    """Return the number of the token that ``tokenizer`` puts in front of a text by itself; None where it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    by_itself = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos if by_itself[:1] == [bos] and plain[:1] != [bos] else None


def _pad(encoded: list[list[int]], pad: int) -> dict[str, Tensor]:
    T = max(map(len, encoded))
    ids = torch.tensor([e + [pad] * (T - len(e)) for e in encoded])
    mask = torch.tensor([[1] * len(e) + [0] * (T - len(e)) for e in encoded])
    return {"input_ids": ids, "attention_mask": mask}
