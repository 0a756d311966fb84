"""Losses of a model on windows of text, kept so that two models can be compared window by window.

Two models that read the same windows share the difficulty of each window; their ratio of perplexities is therefore
known far better than either perplexity.  Order of this file: WindowLosses · paired · comparable.

References
----------
.. [1] Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3 (percentile interval).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowLosses:
    """Summed losses of consecutive windows of one text.

    Attributes
    ----------
    losses : (W,) float64, negative log-likelihood of a window's predicted tokens, summed, in nats
    tokens : (W,) int64, how many tokens were predicted
    """

    losses: np.ndarray
    tokens: np.ndarray

    def __post_init__(self) -> None:
        if self.losses.shape != self.tokens.shape or self.losses.ndim != 1 or not len(self.losses):
            raise ValueError(f"losses {self.losses.shape} and tokens {self.tokens.shape}; give one of each per window, "
                             f"and at least one window")

    @property
    def mean(self) -> float:
        """Mean loss of a token, in nats; its exponential is the perplexity."""
        return float(self.losses.sum() / self.tokens.sum())

    def pack(self) -> str:
        """Return the windows as text: ``tokens:loss`` per window, separated by spaces, losses to 0.0001 nats."""
        return " ".join(f"{n}:{loss:.4f}" for n, loss in zip(self.tokens, self.losses, strict=True))

    @classmethod
    def unpack(cls, text: str) -> WindowLosses:
        """Read the text of ``pack``; ValueError for any other text."""
        try:
            pairs = [(int(n), float(loss)) for n, loss in (window.split(":") for window in text.split())]
        except ValueError:
            raise ValueError(f"{text[:40]!r} holds no window losses; wanted 'tokens:loss tokens:loss ...'") from None
        return cls(np.array([loss for _, loss in pairs], float), np.array([n for n, _ in pairs], int))


def paired(first: str, second: str, *, resamples: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Compare two models window by window: perplexity(first) / perplexity(second).

    Parameters
    ----------
    first, second : packed windows of the same text, as ``quality.perplexity`` returns them under ``windows``
    resamples, seed : of the bootstrap

    Returns
    -------
    dict with ``perplexity_ratio``, its 95 % bootstrap interval over windows ``ratio_low`` and ``ratio_high`` [1]_,
    ``windows``, and ``windows_won``, those on which the first model has the lower loss

    Raises
    ------
    ValueError
        when the two were not measured on the same windows, or there is only one.
    """
    a, b = comparable(first, second)
    difference = a.losses - b.losses  # (W,)
    drawn = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    logs = difference[drawn].sum(1) / a.tokens[drawn].sum(1)
    low, high = np.percentile(logs, [2.5, 97.5])
    return {"perplexity_ratio": math.exp(a.mean - b.mean), "ratio_low": math.exp(low), "ratio_high": math.exp(high),
            "windows": len(difference), "windows_won": int((difference < 0).sum())}


def comparable(first: str, second: str) -> tuple[WindowLosses, WindowLosses]:
    """Return both sets of windows; ValueError unless they are several and predict as many tokens each."""
    a, b = WindowLosses.unpack(first), WindowLosses.unpack(second)
    if len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any():
        raise ValueError(f"the two models were not measured on the same windows: {len(a.tokens)} windows with "
                         f"{a.tokens.sum()} tokens against {len(b.tokens)} with {b.tokens.sum()}; measure both alike")
    if len(a.tokens) < 2:
        raise ValueError("a single window cannot be resampled; measure several, with a shorter window or more tokens")
    return a, b
