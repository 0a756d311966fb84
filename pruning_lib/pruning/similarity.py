"""Distances between two representations: 0 for equal ones, larger for more different ones.

A representation is a matrix of features with one row per sample: x (N, P) and y (N, Q), with rows of the same samples
in the same order.  Each metric is invariant to some maps (rotation, scaling, permutation of features ...).
All computations are in float64.
Order of this file: the metrics · distances to many · one side of a comparison · the Gaussian alignment · the table.

Degenerate input.  Refused with a ValueError: other shapes than (N, P) with N >= 2 and P >= 1, integers, NaN or
infinity, sides with different N, labels that are not N integers; and the cases named at the metrics below.
Defined: a constant feature has no effect; a constant representation has no direction, so its distance is 0 from another
constant one, and from all others that of unrelated ones (1 for CKA, pi/2 for angles).  If P and Q differ, the narrower
one is padded with zeros.

References
----------
.. [1] Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv 1905.00414.
.. [2] Williams et al., "Generalized Shape Metrics on Neural Representations", 2021, arXiv 2110.14739.
.. [3] Duong et al., "Representational dissimilarity metric spaces for stochastic neural networks", 2023,
   arXiv 2211.11665.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from pruning_lib._registry import Table
from pruning_lib.pruning.gaussian_alignment import aligned_distance
from pruning_lib.pruning.sides import JITTER, Side, angle, on_one_thread, polar, same_width, sides

# The metrics of the Consensus paper (Mugnaini et al. 2024, arXiv 2411.14345).  A metric that is registered later does
# not become a part of Consensus.
PAPER_METRICS = ("cka", "gaussian_0", "gaussian_1", "gaussian_2", "permutation", "linear_shape_0", "linear_shape_1",
                 "wasserstein")

__all__ = ["METRICS", "PAPER_METRICS", "Metric", "cka_distance", "distances", "expected_seconds", "gaussian_distance",
           "linear_shape_distance", "permutation_distance", "wasserstein_distance"]


def cka_distance(x: Tensor, y: Tensor) -> float:
    """Return 1 - linear CKA [1]_ (their eq. 3 with centred columns); 0 to 1.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float
    """
    return _cka(*sides(x, y))


def gaussian_distance(x: Tensor, y: Tensor, labels: Tensor, *, alpha: float, jitter: float = JITTER,
                      starts: int | None = None, seed: int = 0) -> float:
    """Return the distance between class-wise Gaussian fits after the best common rotation [3]_.

    The minimum over orthogonal T of the root of the mean over classes of
    ``alpha |m_x - T m_y|^2 + (2 - alpha) Bures(S_x, T S_y T')^2``, where m and S are mean and covariance (divided by
    n - 1) of a class; ``Bures(S, R)^2 = tr S + tr R - 2 tr (S^1/2 R S^1/2)^1/2``.  In units of the features.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float
    labels : (N,) integers; the classes are those that occur, and each weighs the same
    alpha : 0 to 2; 2 compares means only, 0 covariances only, 1 is the 2-Wasserstein distance
    jitter : added to the diagonal of every covariance, so that a class may have fewer samples than features
    starts : pairs of random starting alignments, in addition to four computed from the data; None takes a number of
        about equal cost at any width, 64 for up to 19 features and 2 from 55 on
    seed : seed of the random alignments

    Raises
    ------
    ValueError
        if ``alpha`` < 2 and a class has a single sample, which has no covariance.

    Notes
    -----
    ``alpha`` 2 has a closed form.  Otherwise the problem has local minima and the value returned is an upper bound:
    the best of all starts.  The starts are closed under transposition, so that the distance is symmetric.
    Means are not centred, as in the authors' code: T turns about the origin, and with ``alpha`` > 0 a shift counts.
    Departs from their code, which starts from the aligned means only and has no jitter.
    """
    if not 0 <= alpha <= 2:
        raise ValueError(f"alpha is {alpha}; give 0 (covariances only) to 2 (means only)")
    if jitter < 0 or (starts or 0) < 0:
        raise ValueError(f"jitter is {jitter} and starts {starts}; give numbers that are not negative")
    return aligned_distance(*sides(x, y, labels, jitter=jitter), alpha=alpha, starts=starts, seed=seed)


def permutation_distance(x: Tensor, y: Tensor) -> float:
    """Return the angle between centred representations after the best one-to-one matching of features [2]_.

    The unit is radians, 0 to pi.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float
    """
    return _permutation(*sides(x, y))


def linear_shape_distance(x: Tensor, y: Tensor, *, alpha: float) -> float:
    """Return the angle between partly whitened, centred representations after the best rotation [2]_.

    The unit is radians, 0 to pi/2.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float
    alpha : 0 whitens (invariant to any invertible linear map: arccos of the mean canonical correlation), 1 does not
        (invariant to rotations: Procrustes); in between, singular values s become ``alpha s + (1 - alpha)``

    Raises
    ------
    ValueError
        if ``alpha`` is 0 and a side has N - 1 independent features or more: whitened samples are then equidistant.

    Notes
    -----
    Departs from [2]_ for 0 < alpha < 1: s is divided by its root mean square first, so that units do not matter.
    Whitening leaves out directions below 1e-6 of the largest; if r_x and r_y directions are left, alpha 0 is
    arccos(sum of canonical correlations / sqrt(r_x r_y)).  Published re-uses fit on some rows and score on others; all
    rows are used here for both.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give 0 (whitened) to 1 (rotations only)")
    return _linear_shape(*sides(x, y), alpha=alpha)


def wasserstein_distance(x: Tensor, y: Tensor) -> float:
    """Return the Wasserstein-1 distance between the values of x and y, pooled over samples and features.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float; the result is in their units
    """
    return _wasserstein(*sides(x, y))


def distances(x: Tensor, ys: Iterable[Tensor], labels: Tensor | None = None, *, metrics: Sequence[str] = PAPER_METRICS,
              progress: bool = False) -> dict[str, Tensor]:
    """Return the distances of one representation to many, by several metrics.

    The values equal those of the functions for one pair.  Factors of ``x`` are computed once, factors of each of ``ys``
    once for all metrics; ``ys`` may be a generator, of which one item at a time is in memory.

    Parameters
    ----------
    x : (N, P) float
    ys : L tensors (N, Q) float; Q may differ between them
    labels : (N,) classes, for metrics that need them
    metrics : keys of METRICS; by default the eight of the Consensus paper
    progress : show a bar that names the metric at work

    Returns
    -------
    dict, key -> (L,) float64

    Raises
    ------
    ValueError
        for unknown keys, and for inputs refused by the metrics.
    """
    entries = {key: METRICS[key] for key in metrics}
    for key, metric in entries.items():
        if metric.needs_labels and labels is None:
            raise ValueError(f"metric {key!r} needs labels; give the class of each sample, or leave the metric out")
    one = Side(x, labels, name="x")
    found: dict[str, list[float]] = {key: [] for key in entries}
    total = len(ys) * len(entries) if isinstance(ys, Sequence | Tensor) else None
    with tqdm(total=total, desc="distances", disable=not progress, leave=False) as bar:
        for i, y in enumerate(ys):
            other = Side(y, labels, name=f"ys[{i}]", like=one)
            for key, metric in entries.items():
                bar.set_postfix_str(key)
                found[key].append(metric.of_sides(one, other) if metric.of_sides else metric.distance(x, y, labels))
                bar.update()
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


def expected_seconds(samples: int, features: int, classes: int, metrics: Sequence[str] = PAPER_METRICS
                     ) -> dict[str, float]:
    """Estimate the seconds that each metric takes for one pair on this machine.

    Counts the products, singular values and sorts of a typical search, as the metric's entry states them, and times one
    product of 256 x 256 matrices: the order of magnitude, within a factor of about three.
    """
    rate, C = _product_rate(), max(1, classes)
    return {key: METRICS[key].products(samples, features, C) / rate for key in metrics}


def _search(N: int, P: int, C: int) -> float:
    """Return the multiply-adds of the search for the best alignment of C Gaussians."""
    r = min(N, P)  # the Gaussian metrics work in the span of the samples
    starts = 4 + 2 * max(2, min(64, 500_000 // r**3)) if r < 128 or N >= P else 4
    steps = starts * 4 + max(2, starts // 4) * 8
    return ((steps + 40) * (9 * C + 6) + 120 * (C + 1)) * r**3 if N >= P else (steps + 10) * 7 * r**3 + 2 * N**2 * P


def _whitening(N: int, P: int, C: int) -> float:
    return 30 * N * P * min(N, P)


@on_one_thread()
def _product_rate() -> float:
    """Return the multiply-adds per second of double-precision products on one thread."""
    a = torch.ones(256, 256, dtype=torch.float64)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 256**3 / max(time.perf_counter() - start, 1e-9)


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS: a distance and its mathematical properties, which tests verify.

    Attributes
    ----------
    about : one line for readers
    distance : (x, y, labels) -> float; labels may be None unless needed
    needs_labels : True if ``distance`` depends on the labels
    symmetric : True if d(x, y) = d(y, x)
    triangle : True if d(x, z) <= d(x, y) + d(y, z), as in a true metric
    invariances : maps of one side that do not change the distance: permutation (of features), rotation (any orthogonal
        map), linear (any invertible map), scale (a positive factor), translation (of all samples alike)
    of_sides : the distance of two prepared sides; entries without it are computed pair by pair
    needs_samples : True if it is defined only for more samples than features
    products : (N samples, P features, C classes) -> multiply-adds for one pair, roughly; states the time
    """

    about: str
    distance: Callable[[Tensor, Tensor, Tensor | None], float]
    needs_labels: bool = False
    symmetric: bool = True
    triangle: bool = True
    invariances: tuple[str, ...] = ()
    of_sides: Callable[[Side, Side], float] | None = None
    needs_samples: bool = False
    products: Callable[[int, int, int], float] = lambda N, P, C: 0.0


def _entry(about: str, compare: Callable[..., float], *invariances: str, products: Callable[[int, int, int], float],
           triangle: bool = True, needs_labels: bool = False, needs_samples: bool = False, **fixed: float) -> Metric:
    def of_sides(one: Side, other: Side) -> float:
        return compare(one, other, **fixed)

    def distance(x: Tensor, y: Tensor, labels: Tensor | None = None) -> float:
        return of_sides(*sides(x, y, labels if needs_labels else None))

    return Metric(about, distance, needs_labels, True, triangle, invariances, of_sides, needs_samples, products)


def _cka(x: Side, y: Side) -> float:
    if not (x.varies and y.varies):
        return float(x.varies != y.varies)
    shared = (x.direction.T @ y.direction).square().sum()
    return max(0.0, 1 - (shared / (x.gram_norm * y.gram_norm)).item())


def _permutation(x: Side, y: Side) -> float:
    u, v = same_width(x.direction, y.direction)
    return angle(u, v[:, linear_sum_assignment(u.T @ v, maximize=True)[1]])


@on_one_thread()
def _linear_shape(x: Side, y: Side, *, alpha: float) -> float:
    N = len(x.raw)
    for side in (x, y):
        if alpha == 0 and side.rank >= N - 1:
            raise ValueError(f"{N} samples of {side.rank} independent features: whitened, they are all equidistant; "
                             "give more samples than features (ten times as many), or alpha > 0")
    u, v = same_width(x.whitened(alpha), y.whitened(alpha))
    return angle(u, v @ polar(v.T @ u)[0])


def _wasserstein(x: Side, y: Side) -> float:
    """Return the area between the two quantile functions, which are steps of 1/n and 1/m."""
    u, v = x.sorted, y.sorted
    n, m = len(u), len(v)
    if n == m:
        return (u - v).abs().mean().item()
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1 / (n m)
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return (widths * (u[(ends - 1) // m] - v[(ends - 1) // n]).abs()).sum().item()


METRICS: Table = Table("metric")
METRICS["cka"] = _entry(
    "1 - linear CKA: are the same samples similar in both?", _cka,
    "permutation", "rotation", "scale", "translation", triangle=False, products=lambda N, P, C: 2 * N * P**2)
METRICS["gaussian_0"] = _entry(
    "shape of the class clouds: covariances only", aligned_distance,
    "permutation", "rotation", "translation", products=_search, needs_labels=True, alpha=0.0)
METRICS["gaussian_1"] = _entry(
    "place and shape of the class clouds: 2-Wasserstein", aligned_distance,
    "permutation", "rotation", products=_search, needs_labels=True, alpha=1.0)
METRICS["gaussian_2"] = _entry(
    "place of the class clouds: means only", aligned_distance, "permutation", "rotation",
    products=lambda N, P, C: 20 * min(N, P)**3 + 2 * N**2 * P, needs_labels=True, alpha=2.0)
METRICS["permutation"] = _entry(
    "angle after matching features one to one", _permutation, "permutation", "scale", "translation",
    products=lambda N, P, C: 2 * N * P**2 + 20 * P**2.3)
METRICS["linear_shape_0"] = _entry(
    "angle after whitening: do both contain the same information up to a linear map?", _linear_shape,
    "permutation", "rotation", "linear", "scale", "translation", products=_whitening, needs_samples=True, alpha=0.0)
METRICS["linear_shape_1"] = _entry(
    "angle after the best rotation (Procrustes)", _linear_shape,
    "permutation", "rotation", "scale", "translation", products=_whitening, alpha=1.0)
METRICS["wasserstein"] = _entry(
    "do both contain the same values, at any place?", _wasserstein, "permutation",
    products=lambda N, P, C: 30 * N * P)
