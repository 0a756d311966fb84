"""Batches: texts as padded tensors of token numbers, and tensors of other forms as batches.

Methods take dicts of ``input_ids`` and ``attention_mask``, each (B, T), padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WAY = "give pl.batches(texts, tokenizer), or dicts of input_ids and attention_mask, each (B, T)"


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

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> (batch,) = pl.batches(["Once", "The sea is"], tokenizer)
    >>> batch["attention_mask"].sum(-1).tolist()  # tokens of each prompt, the longest first
    [10, 4]
    """
    if tokenizer is None:
        raise ValueError("no tokenizer: AMP prunes language models; whole blocks of an image network are removed by "
                         "pl.prune_blocks and the notebook consensus_prune")
    if isinstance(prompts, str):
        raise ValueError(f"prompts is a single text, {prompts[:40]!r}; give a list of texts: [text], or "
                         f"data.texts(name) for a data set or a file")
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


def _pad(encoded: list[list[int]], pad: int) -> dict[str, Tensor]:
    T = max(map(len, encoded))
    ids = torch.tensor([e + [pad] * (T - len(e)) for e in encoded])
    mask = torch.tensor([[1] * len(e) + [0] * (T - len(e)) for e in encoded])
    return {"input_ids": ids, "attention_mask": mask}


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
        raise ValueError(f"batch {number}: an attention_mask has gaps; it is 1 for tokens and 0 at one end")
    if seen[:, 0].all():
        return {"input_ids": ids, "attention_mask": mask}
    order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)  # the tokens first, in their order
    return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}
