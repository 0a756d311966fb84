"""Text of a reconstruction: a part to fit on, and a part that is held out to choose among several ridges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

Batch = Mapping[str, Tensor]


def refuse_little_text(batches: Sequence[Batch], ridge: float | Sequence[float]) -> None:
    """Raise ValueError for too little text: one text, or two where one is held out to choose among several ridges."""
    apart = isinstance(ridge, Sequence)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    if texts < 1 + apart:
        raise ValueError(f"{texts} texts for the reconstruction; give at least {1 + apart}"
                         + ", so that one can be held out to choose the ridge" * apart
                         + ", or reconstruction='none'")


def split(batches: list[Batch], apart: bool) -> tuple[list[Batch], list[Batch]]:
    """Return the batches to fit on and, if ``apart``, every fifth one to choose the ridge.

    Where there is a single batch, its texts take the place of batches.
    """
    if apart and len(batches) == 1:
        rows = range(len(batches[0]["input_ids"]))
        batches = [{name: part[i:i + 1] for name, part in batches[0].items()} for i in rows]
    held = batches[1::5] if apart else []
    return [b for i, b in enumerate(batches) if not apart or i % 5 != 1], held
