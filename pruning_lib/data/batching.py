"""Batches of token numbers: the forms people have, converted to the form of the methods.

Methods take dicts of ``input_ids`` and ``attention_mask``, each (B, T), padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

WAY = "give pl.batches(texts, tokenizer), or dicts of input_ids and attention_mask, each (B, T)"


def bos_token(tokenizer: Any) -> int | None:
    """Return the number of the token that ``tokenizer`` puts in front of a text by itself; None where it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    by_itself = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos if by_itself[:1] == [bos] and plain[:1] != [bos] else None


def right_padded(batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return batches padded on the right, from a list, a generator or a ``DataLoader``.

    Prompts padded on the left move to the left edge: their tokens then have the positions they were trained with.
    Other keys, such as ``labels``, are left out.

    Raises
    ------
    ValueError
        for texts, tensors without a mask, prompts without tokens, and masks with gaps, with the form that is wanted.
    """
    if isinstance(batches, (str, bytes, Mapping, Tensor)):
        raise ValueError(f"batches is a single {type(batches).__name__}, wanted several batches; {WAY}")
    return [_right_padded(batch, i) for i, batch in enumerate(batches)]


def _right_padded(batch: Any, number: int) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"batch {number} is a {type(batch).__name__} without input_ids; {WAY}")
    if "attention_mask" not in batch:
        raise ValueError(f"batch {number} has no attention_mask, so padding is unknown; without padding "
                         f"add attention_mask=torch.ones_like(input_ids)")
    ids, mask = (torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask"))
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(f"batch {number}: input_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}; both "
                         f"are (B, T)")
    seen = mask.bool()
    if not seen.any(1).all():
        raise ValueError(f"batch {number} has a prompt without tokens; drop empty texts")
    if (seen.diff(dim=1).sum(1) > 1).any():  # a mask changes at most once: where the padding begins, or ends
        raise ValueError(f"batch {number}: an attention_mask has gaps; it is 1 for the tokens of a prompt, 0 at one end")
    if seen[:, 0].all():
        return {"input_ids": ids, "attention_mask": mask}
    order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)  # the tokens first, in their order
    return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}
