"""Rule for "this criterion removes better blocks than that one" to become a statement, and its arithmetic.

The rule was written and committed before any of the runs that it judges had ended (rows ``cifar10-resnet*`` of
``notebooks/runs.yml``).

*Question.*  A criterion decides which block is removed next.  Two criteria are compared on the same network, with the
same number of removed blocks, and with the same tuning.

*Units.*  Tuning seeds.  A seed fixes the order of the training images, their shifts and flips, and the calibration
images; runs of one criterion differ in nothing else.  Test images are no units: they tell two networks apart, not two
criteria.  A criterion with fewer than two seeds is shown and not judged.

*Measures.*  Two per run, on all test images: ``end``, the accuracy after the last and longest tuning, and ``way``, the
mean over all rounds of the accuracy after the tuning of that round.

*Sure differences.*  The first criterion is *better* by a measure if all three hold, *worse* if they hold the other way
round:

1. the difference of the means is at least ``SMALLEST`` (one point);
2. the p-value of Welch's t-test over seeds stays below ``LEVEL`` after Holm's correction over all comparisons of the
   claim: all networks, rivals and both measures together;
3. the difference exceeds the noise floor, the root mean square difference of two seeds of one criterion, the larger of
   both.

*Equal.*  Where the 95 % interval of Welch's test lies inside ± ``SMALLEST`` there is *no difference that matters*.
Everything else is *not told apart*.  Where all runs of both criteria removed the same blocks in the same order, they
are *the same path*, and nothing is compared.

*The verdict* on a claim: *reproduced* if there are better cases and no worse ones; *partly* if better cases outnumber
worse ones; *contradicted* if there are worse cases and no better ones; *partly contradicted* if worse cases outnumber
better ones; *no difference* otherwise.

*Three claims.*  "The ranking finds unimportant blocks": Consensus against ``random``.  "Better than no ranking":
against ``front_to_back``.  "Better than one metric alone": against every single metric that was run.

*"Low accuracy drop"* is *reproduced* if the network with the most multiply-adds removed ends at most ``LOW_DROP`` below
the control that lost no block and was tuned as long, means over seeds; *contradicted* if it ends further below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pruning_lib.evaluation.multiple_comparisons import holm

SMALLEST = 0.01  # the smallest difference in accuracy that matters, a fraction
LOW_DROP = 0.015  # the largest accuracy drop that counts as low, a fraction
LEVEL = 0.05  # of Holm's correction


@dataclass(frozen=True)
class Comparison:
    """Two criteria by one measure; all fractions of accuracy, first minus second.

    Attributes
    ----------
    difference, low, high : of the means over seeds, and its 95 % interval by Welch's test
    p_value : of that test, not corrected
    floor : the noise floor
    same_path : all runs of both removed the same blocks in the same order
    """

    difference: float
    low: float
    high: float
    p_value: float
    floor: float
    same_path: bool = False


def compare(first: Sequence[float], second: Sequence[float], *, paths: Sequence[str] = ()) -> Comparison:
    """Compare two criteria by one measure, one value per seed.

    Parameters
    ----------
    first, second : accuracies, fractions, one per seed
    paths : order of removal of each run of both; empty: not known

    Raises
    ------
    ValueError
        for fewer than two seeds of one of them.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} seeds against {len(b)}; give at least two of each")
    difference, floor = float(a.mean() - b.mean()), math.sqrt(2 * max(a.var(ddof=1), b.var(ddof=1)))
    same = len(set(paths)) == 1
    if floor == 0:  # no spread, as of runs that are not tuned: Welch's test divides by it
        return Comparison(difference, difference, difference, 0.0 if difference else 1.0, floor, same)
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Comparison(difference, float(low), float(high), float(test.pvalue), floor, same)


def judge(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the judgement on each comparison of one claim, in the words of the rule of this module."""
    corrected = iter(holm([c.p_value for c in comparisons if not c.same_path]))
    return ["the same path" if c.same_path else _judged(c, next(corrected)) for c in comparisons]


def _judged(c: Comparison, p: float) -> str:
    if p < LEVEL and abs(c.difference) >= max(SMALLEST, c.floor):
        return "better" if c.difference > 0 else "worse"
    if -SMALLEST < c.low and c.high < SMALLEST:
        return "no difference that matters"
    return "not told apart"


def low_drop(pruned: Sequence[float], control: Sequence[float]) -> str:
    """Return the verdict on "low accuracy drop" from the accuracies at the end, one per seed."""
    if not len(pruned) or not len(control):
        return "not run"
    return "reproduced" if np.mean(control) - np.mean(pruned) <= LOW_DROP else "contradicted"
