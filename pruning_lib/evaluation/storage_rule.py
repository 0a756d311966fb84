"""Rule for the question "prune, quantise, or both?", and its arithmetic.

The rule was written and committed before the run that it judges (row ``prune-or-quantize-smollm2`` of
``notebooks/runs.yml``).

*Candidates.*  Files of one model: whole, or pruned by some fraction, each stored in several formats.  All are run by
the same program on the same windows of test text.

*A case* is one pruned file in a quantised format or in float16.  It has two rivals, both of the *whole* model:

- at equal bytes: among the files that are no larger, the one with the lowest perplexity;
- at equal speed: among the files that write at least as many tokens per second, the one with the lowest perplexity.

A pruned file without a rival is *out of reach* of quantising alone: no file of the whole model is that small, or that
fast.

*Unit.*  Two fixed files are compared over windows of text (paired).  The measure is the ratio of perplexities, pruned /
rival, with a t interval and p-value of the mean difference over windows.

*Judgement.*  *better* or *worse* if the ratio differs from 1 by ``SMALLEST`` (2 %) or more, and the p-value stays below
5 % after Holm's correction over all cases of a question; *no difference that matters* if the interval lies within 2 %;
else *not told apart*.

*The verdict* on "pruning is the better choice" follows from these words as in ``score_rule.verdict``, for bytes and for
speed.  Cases out of reach do not count; they are named beside it.

*Speed.*  A pruned file and the whole one in the same format are measured in turn.  Writing a token reads all weights
and the keys and values; the ratio of those bytes, whole / pruned, is the most that writing can gain.  A pruned file
*reaches* the bound if its median gain is at least ``SHARE`` (90 %) of that ratio with the lower end of its interval,
*misses* it if the upper end is below, and is *not told apart* otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pruning_lib.evaluation import score_rule
from pruning_lib.evaluation.multiple_comparisons import holm
from pruning_lib.evaluation.window_losses import comparable

SMALLEST = 1.02  # the smallest ratio of perplexities that matters
SHARE = 0.9  # of the largest possible gain


@dataclass(frozen=True)
class Case:
    """One pruned file beside the best file of the whole model that is no larger, or no slower.

    Attributes
    ----------
    pruned, rival : names of the files; the rival is empty where there is none
    ratio, low, high : of perplexities, pruned / rival, with its 95 % t interval over windows; NaN without a rival
    p_value : not corrected
    """

    pruned: str
    rival: str
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan


def cases(files: Sequence[dict[str, Any]], *, at_equal: str) -> list[Case]:
    """Return one case per pruned file.

    Parameters
    ----------
    files : each with ``name``, ``removed_fraction``, ``file_bytes``, ``tokens_per_s``, ``perplexity`` and ``windows``,
        packed losses
    at_equal : ``"file_bytes"`` or ``"tokens_per_s"``

    Raises
    ------
    ValueError
        for another ``at_equal``.
    """
    if at_equal not in ("file_bytes", "tokens_per_s"):
        raise ValueError(f"at_equal={at_equal!r}; allowed: file_bytes, tokens_per_s")
    sign = 1 if at_equal == "file_bytes" else -1
    whole = [file for file in files if file["removed_fraction"] == 0]
    found = []
    for file in files:
        if file["removed_fraction"] > 0:
            rivals = [other for other in whole if sign * other[at_equal] <= sign * file[at_equal]]
            best = min(rivals, key=lambda other: other["perplexity"], default=None)
            found.append(_compared(file, best) if best else Case(file["name"], ""))
    return found


def _compared(file: dict[str, Any], rival: dict[str, Any]) -> Case:
    a, b = comparable(file["windows"], rival["windows"])
    difference = (a.losses - b.losses) / a.tokens.mean()  # (W,), its mean is the log of the ratio
    mean, error = float(difference.mean()), float(stats.sem(difference))
    half = float(stats.t.ppf(0.975, len(difference) - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, len(difference) - 1)) if error else float(mean == 0)
    return Case(file["name"], rival["name"], math.exp(mean), math.exp(mean - half), math.exp(mean + half), p_value)


def judge(cases: Sequence[Case]) -> list[str]:
    """Return the judgement on each case of one question, in the words of the rule of this module."""
    judged = [case for case in cases if case.rival]
    corrected = iter(holm([case.p_value for case in judged]))
    return [_judged(case, float(next(corrected))) if case.rival else "out of reach" for case in cases]


def _judged(case: Case, p: float) -> str:
    if p < score_rule.LEVEL and abs(math.log(case.ratio)) >= math.log(SMALLEST):
        return "better" if case.ratio < 1 else "worse"
    inside = 1 / SMALLEST <= case.low and case.high <= SMALLEST
    return "no difference that matters" if inside else "not told apart"


def reached(low: float, high: float, bound: float) -> str:
    """Return whether a gain with the interval [``low``, ``high``] reaches its share of ``bound``, by the rule."""
    if low >= SHARE * bound:
        return "reaches"
    return "misses" if high < SHARE * bound else "not told apart"


def front(bytes_or_seconds: Sequence[float], perplexity: Sequence[float]) -> np.ndarray:
    """Return which files no other file beats: none is at least as small and at least as good, and better in one."""
    x, y = np.asarray(bytes_or_seconds, float), np.asarray(perplexity, float)
    at_least = (x[None] <= x[:, None]) & (y[None] <= y[:, None])
    better = (x[None] < x[:, None]) | (y[None] < y[:, None])
    return np.logical_not((at_least & better).any(axis=1))
