"""Rule for a difference between two scores to become a statement, AMP against others, and its arithmetic.

The rule was written and committed before the runs that it judges (rows ``draws-*`` of ``notebooks/runs.yml``).

*Question.*  A score decides which heads and neurons are removed.  Two scores are compared at the same removed fraction,
on the same model, by the perplexity that is left without reconstruction and tuning.

*Units.*  Calibration draws: a score is run on several disjoint draws of prompts, and two scores see the same draws
(paired).  ``random`` sees no prompts; its units are seeds, and its comparison is not paired.

*Measure.*  The ratio of perplexities, first / second: exponential of the mean difference of log perplexity
over draws, with a t interval and p-value over draws (paired t-test; Welch's t-test against ``random``).

*Sure differences.*  The first score is *better* if all four hold, *worse* if all four hold the other way round:

1. the ratio is at most 1 / ``SMALLEST`` (a gain of 2 %; rounding to bfloat16 moves a perplexity by about 1 %);
2. the p-value stays below ``LEVEL`` after Holm's correction over all comparisons of the claim, all fractions together;
3. the difference exceeds the noise floor: the root mean square difference of two draws of one score, the larger of
   both;
4. it is not the work of a few windows of the test text: the 95 % bootstrap interval over windows, of the losses
   averaged over draws, lies on one side of 1.

*Equal.*  Where the t interval lies inside [1 / ``SMALLEST``, ``SMALLEST``] there is *no difference that matters*.
Everything else is *not told apart*.

*The verdict* on a claim "the first score is better": *reproduced* if there are better cases and no worse ones;
*partly* if better cases outnumber worse ones; *contradicted* if there are worse cases and no better ones; *partly
contradicted* if worse cases outnumber better ones; *no difference* otherwise.

*Two claims.*  "Importances tell unimportant parts apart": AMP against ``random``.  "Better than other scores": AMP
against all other scores that were run, at all fractions that were run.

*The default* that the library recommends is the score with the lowest mean log perplexity at 20 %, if it is better than
AMP there by this rule and not worse at any other fraction; else AMP.

*Larger models* (written before a model of 1.5 billion parameters was cut).  *Question.* Does a larger model lose less?
Units are models.  The measure is the nats per character that a cut adds to the dense model's, against the share of the
blocks' parameters that it removes; embeddings are not cut, so shares of all parameters do not compare.  Between the
shares at which both of two models were cut, the line through a model's cuts gives its loss.  The larger one *loses
less* if its line, with the highest draw at every cut, lies below the other's with the lowest draw there; *loses more*
the other way round; else the two are *not told apart*.  Models differ in family and training too, so the answer is
about these models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pruning_lib.evaluation.multiple_comparisons import holm
from pruning_lib.evaluation.window_losses import WindowLosses, paired

SMALLEST = 1.02  # the smallest ratio of perplexities that matters
LEVEL = 0.05  # of Holm's correction


@dataclass(frozen=True)
class Comparison:
    """Two scores at one removed fraction; all ratios are of perplexities, first / second.

    Attributes
    ----------
    ratio, low, high : mean over draws and its 95 % t interval
    p_value : of the t-test over draws, not corrected
    floor : the noise floor as a ratio above 1
    windows_low, windows_high : 95 % bootstrap interval over windows
    """

    ratio: float
    low: float
    high: float
    p_value: float
    floor: float
    windows_low: float
    windows_high: float


def compare(first: Sequence[str], second: Sequence[str], *, same_draws: bool = True) -> Comparison:
    """Compare two scores from the packed window losses of their draws.

    Parameters
    ----------
    first, second : one text per draw, as ``quality.perplexity`` returns it under ``windows``
    same_draws : the draws of both are the same ones in the same order, and are compared in pairs

    Raises
    ------
    ValueError
        for fewer than two draws, draws that cannot be paired, or other windows.
    """
    a, b = (np.array([WindowLosses.unpack(text).mean for text in texts]) for texts in (first, second))
    if min(len(a), len(b)) < 2 or (same_draws and len(a) != len(b)):
        raise ValueError(f"{len(a)} draws against {len(b)}; give at least two of each, and as many where they are "
                         f"paired")
    test = stats.ttest_rel(a, b) if same_draws else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    windows = paired(average(first), average(second))
    floor = math.sqrt(2 * max(a.var(ddof=1), b.var(ddof=1)))
    return Comparison(math.exp(a.mean() - b.mean()), math.exp(low), math.exp(high), float(test.pvalue), math.exp(floor),
                      windows["ratio_low"], windows["ratio_high"])


def average(draws: Sequence[str]) -> str:
    """Return the losses of each window averaged over draws, packed."""
    found = [WindowLosses.unpack(text) for text in draws]
    return WindowLosses(np.mean([f.losses for f in found], axis=0), found[0].tokens).pack()


def judge(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the judgement on each comparison of one claim, in the words of the rule of this module."""
    corrected = holm([c.p_value for c in comparisons])
    return [_judged(c, p) for c, p in zip(comparisons, corrected, strict=True)]


def _judged(c: Comparison, p: float) -> str:
    if p < LEVEL and abs(math.log(c.ratio)) >= math.log(max(SMALLEST, c.floor)):
        if c.ratio < 1 and c.windows_high < 1:
            return "better"
        if c.ratio > 1 and c.windows_low > 1:
            return "worse"
    if 1 / SMALLEST <= c.low and c.high <= SMALLEST:
        return "no difference that matters"
    return "not told apart"


def verdict(judged: Sequence[str]) -> str:
    """Return the verdict on the claim that the first score is the better one."""
    if not len(judged):
        return "not run"
    better, worse = (list(judged).count(word) for word in ("better", "worse"))
    if better > worse:
        return "partly" if worse else "reproduced"
    if worse > better:
        return "partly contradicted" if better else "contradicted"
    return "no difference"


def larger_loses(larger: Sequence[tuple[float, float, float]], smaller: Sequence[tuple[float, float, float]]) -> str:
    """Return the verdict on the loss of the larger of two models: "less", "more", or "not told apart".

    Parameters
    ----------
    larger, smaller : one triple per cut: the share of the blocks' parameters removed, and the nats per character that
        its draws add to the dense model's, the lowest and the highest

    Notes
    -----
    Lines through cuts are straight, so two of them need to be compared at their corners only.
    """
    ours, theirs = (np.array(sorted(cuts)).reshape(-1, 3).T for cuts in (larger, smaller))
    shares = np.unique(np.concatenate([ours[0], theirs[0]]))
    both = shares[(shares >= max(ours[0][0], theirs[0][0])) & (shares <= min(ours[0][-1], theirs[0][-1]))]
    lows, highs = ([np.interp(both, of[0], of[row]) for of in (ours, theirs)] for row in (1, 2))
    if len(both) and (highs[0] < lows[1]).all():
        return "less"
    return "more" if len(both) and (lows[0] > highs[1]).all() else "not told apart"
