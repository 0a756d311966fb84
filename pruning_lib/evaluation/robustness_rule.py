"""Rule and arithmetic of the verdict on "up to 4 points more robust".

The rule was written and committed before the attacks on the published networks were run.  Five more networks (05 and
15 of both papers, 01 of CKA) joined the rows later, before they had been attacked; the rule is the same.

*Units.*  Two fixed networks, compared on the same test images (paired).  Nothing is said of criteria or of other seeds.

*Comparisons.*  Each pruned network with the whole one, at every budget at which the whole network still answers at
least ``ANSWERED`` of the images; below, there is nothing left to lose or to gain.  An image counts as answered if *no*
attack of that kind of budget (Linf or L2) has fooled the network within the budget.

*Sure changes.*  A gain is sure if it is at least ``SMALLEST`` and its p-value (McNemar's exact test) stays below 5 %
after Holm's correction over all comparisons of one claim.  A loss likewise.

*The verdict.*  ``reproduced``: some sure gain reaches ``CLAIMED``, and sure gains outnumber sure losses.  ``partly``:
sure gains outnumber sure losses.  ``contradicted``: there are sure losses, and sure gains do not outnumber them.
``no difference``: neither is sure.  The rule is the same for the network of the headline alone (78.80 % of the
multiply-adds gone), for the controls (against the network that lost one block and was tuned once, in place of the whole
one) and for the CKA networks, which the claim is not about.

*Equal clean accuracy.*  Beside the difference stands that of the shares of rightly answered images that an attack
leaves; where its interval (paired bootstrap) holds 0, the gain may be one of clean accuracy.

*Masked gradients.*  APGD and Square attack the images that PGD could not fool.  If they take over ``SMALLEST`` more
from a pruned network than from the whole one, gains under PGD alone are not counted as robustness.
(Made precise on 30 November 2026, after that run: such a network enters with all comparisons of the run that has APGD
and Square, and with no other.)

*Corruptions.*  The mean over corruptions and severities of each image, paired; the same ``SMALLEST`` and Holm's
correction over the networks, with the paired t-test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from pruning_lib.evaluation import quality
from pruning_lib.evaluation.multiple_comparisons import holm

SMALLEST = 0.01  # the smallest difference in accuracy that matters, a fraction
CLAIMED = 0.04  # the paper's "up to 4 points"
ANSWERED = 0.05  # share of images that the whole network has to answer under attack
LEVEL = 0.05  # of Holm's correction


def sure_changes(differences: Sequence[float], p_values: Sequence[float]) -> np.ndarray:
    """Return +1 for every sure gain, -1 for every sure loss and 0 elsewhere, by the rule of this module."""
    d = np.asarray(differences, float)
    counts = (np.abs(d) >= SMALLEST) & (holm(p_values) < LEVEL)
    return np.where(counts, np.sign(d), 0).astype(int)


def verdict(differences: Sequence[float], p_values: Sequence[float]) -> str:
    """Return "reproduced", "partly", "contradicted" or "no difference" for all comparisons of one claim.

    Parameters
    ----------
    differences : pruned minus whole, fractions of all images
    p_values : of McNemar's exact test, not corrected
    """
    if not len(differences):
        return "not run"
    sure = sure_changes(differences, p_values)
    gains, losses = int((sure > 0).sum()), int((sure < 0).sum())
    if gains > losses:
        largest = np.asarray(differences, float)[sure > 0].max()
        return "reproduced" if largest >= CLAIMED else "partly"
    return "contradicted" if losses else "no difference"


def summary(differences: Sequence[float], p_values: Sequence[float]) -> dict[str, float | str]:
    """Return the number of comparisons, sure gains and losses, and the verdict; best, worst and mean difference if any.

    Parameters are those of ``verdict``; the differences returned are fractions.
    """
    found: dict[str, float | str] = {"comparisons": len(differences), "sure_gains": 0, "sure_losses": 0}
    if len(differences):
        sure, d = sure_changes(differences, p_values), np.asarray(differences, float)
        found.update(sure_gains=int((sure > 0).sum()), sure_losses=int((sure < 0).sum()), best_fraction=float(d.max()),
                     worst_fraction=float(d.min()), mean_fraction=float(d.mean()))
    return {**found, "verdict": verdict(differences, p_values)}


def masked_gradient(pruned: tuple[float, float], whole: tuple[float, float]) -> bool:
    """Return whether gradients of a pruned network mislead PGD more than those of the whole one, by the rule above.

    Parameters
    ----------
    pruned, whole : accuracy under PGD, and under PGD with APGD and Square, fractions of the same images
    """
    return (pruned[0] - pruned[1]) - (whole[0] - whole[1]) > SMALLEST


def share_correct(packed: Sequence[str]) -> np.ndarray:
    """Return the share of conditions, such as corruptions, under which each image is answered rightly, (N,).

    Parameters
    ----------
    packed : answers to the same N images under each condition, as ``quality.pack`` writes them
    """
    return np.mean([quality.unpack(text) for text in packed], axis=0)


def mean_difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Return the difference of two means over the same images, its 95 % interval, and the p-value of the paired t-test.

    Parameters
    ----------
    first, second : (N,) per image, such as the share of corruptions under which it is answered rightly
    """
    d = np.asarray(first, float) - np.asarray(second, float)
    half = 1.96 * d.std(ddof=1) / len(d) ** 0.5
    p = float(stats.ttest_1samp(d, 0).pvalue) if d.std() else 1.0
    return {"difference_fraction": float(d.mean()), "difference_low": float(d.mean() - half),
            "difference_high": float(d.mean() + half), "p_value": p}


def kept_share_difference(first: np.ndarray, first_clean: np.ndarray, second: np.ndarray, second_clean: np.ndarray, *,
                          draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Return how much more of its clean accuracy the first network keeps, with a 95 % interval.

    Parameters
    ----------
    first, second : (N,) booleans, right under attack; ``_clean`` without attack; the same images for all four
    draws, seed : of the bootstrap over images, which keeps the four answers to an image together
    """
    answers = np.stack([first, first_clean, second, second_clean]).astype(float)  # (4, N)
    N = answers.shape[1]
    weights = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=draws) / N  # (draws, N)
    means = np.concatenate([answers.mean(1)[:, None], answers @ weights.T], 1)  # (4, 1 + draws)
    share = means[0] / np.maximum(means[1], 1e-12) - means[2] / np.maximum(means[3], 1e-12)
    low, high = np.quantile(share[1:], [0.025, 0.975])
    return float(share[0]), float(low), float(high)
