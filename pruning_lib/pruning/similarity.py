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

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import pad

from pruning_lib._registry import Table

JITTER = 1e-6  # added to the variances, in squared units of the features
ROUNDING = 1e-6  # directions with a smaller share of the largest singular value are float32 rounding errors

__all__ = ["METRICS", "Metric", "cka_distance", "distances", "gaussian_distance", "linear_shape_distance",
           "permutation_distance", "wasserstein_distance"]


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Use one thread: for small matrices a second one is useless, and on a busy machine tens of times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cka_distance(x: Tensor, y: Tensor) -> float:
    """Return 1 - linear CKA [1]_ (their eq. 3 with centred columns); 0 to 1.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float
    """
    return _cka(*_sides(x, y))


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
    return _gaussian(*_sides(x, y, labels, jitter=jitter), alpha=alpha, starts=starts, seed=seed)


def permutation_distance(x: Tensor, y: Tensor) -> float:
    """Return the angle between centred representations after the best one-to-one matching of features [2]_.

    The unit is radians, 0 to pi.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float
    """
    return _permutation(*_sides(x, y))


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
    return _linear_shape(*_sides(x, y), alpha=alpha)


def wasserstein_distance(x: Tensor, y: Tensor) -> float:
    """Return the Wasserstein-1 distance between the values of x and y, pooled over samples and features.

    Parameters
    ----------
    x, y : (N, P) and (N, Q) float; the result is in their units
    """
    return _wasserstein(*_sides(x, y))


def distances(x: Tensor, ys: Iterable[Tensor], labels: Tensor | None = None, *, metrics: Sequence[str] | None = None
              ) -> dict[str, Tensor]:
    """Return the distances of one representation to many, by several metrics.

    The values equal those of the functions for one pair.  Factors of ``x`` are computed once, factors of each of ``ys``
    once for all metrics; ``ys`` may be a generator, of which one item at a time is in memory.

    Parameters
    ----------
    x : (N, P) float
    ys : L tensors (N, Q) float; Q may differ between them
    labels : (N,) integers, for metrics that need them
    metrics : keys of METRICS; None for all

    Returns
    -------
    dict, key -> (L,) float64

    Raises
    ------
    ValueError
        for unknown keys, and for inputs refused by the metrics.
    """
    entries = {key: METRICS[key] for key in (METRICS if metrics is None else metrics)}
    for key, metric in entries.items():
        if metric.needs_labels and labels is None:
            raise ValueError(f"metric {key!r} needs labels; give the class of each sample, or leave the metric out")
    one = _Side(x, labels, name="x")
    found: dict[str, list[float]] = {key: [] for key in entries}
    for i, y in enumerate(ys):
        other = _Side(y, labels, name=f"ys[{i}]", like=one)
        for key, metric in entries.items():
            found[key].append(metric.of_sides(one, other) if metric.of_sides else metric.distance(x, y, labels))
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


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
    """

    about: str
    distance: Callable[[Tensor, Tensor, Tensor | None], float]
    needs_labels: bool = False
    symmetric: bool = True
    triangle: bool = True
    invariances: tuple[str, ...] = ()
    of_sides: Callable[[_Side, _Side], float] | None = None
    needs_samples: bool = False


def _entry(about: str, compare: Callable[..., float], *invariances: str, triangle: bool = True,
           needs_labels: bool = False, needs_samples: bool = False, **fixed: float) -> Metric:
    def of_sides(one: _Side, other: _Side) -> float:
        return compare(one, other, **fixed)

    def distance(x: Tensor, y: Tensor, labels: Tensor | None = None) -> float:
        return of_sides(*_sides(x, y, labels if needs_labels else None))

    return Metric(about, distance, needs_labels, True, triangle, invariances, of_sides, needs_samples)


def _cka(x: _Side, y: _Side) -> float:
    if not (x.varies and y.varies):
        return float(x.varies != y.varies)
    shared = (x.direction.T @ y.direction).square().sum()
    return max(0.0, 1 - (shared / (x.gram_norm * y.gram_norm)).item())


def _permutation(x: _Side, y: _Side) -> float:
    u, v = _same_width(x.direction, y.direction)
    return _angle(u, v[:, linear_sum_assignment(u.T @ v, maximize=True)[1]])


@_on_one_thread()
def _linear_shape(x: _Side, y: _Side, *, alpha: float) -> float:
    N = len(x.raw)
    for side in (x, y):
        if alpha == 0 and side.rank >= N - 1:
            raise ValueError(f"{N} samples of {side.rank} independent features: whitened, they are all equidistant; "
                             "give more samples than features (ten times as many), or alpha > 0")
    u, v = _same_width(x.whitened(alpha), y.whitened(alpha))
    return _angle(u, v @ _polar(v.T @ u)[0])


def _wasserstein(x: _Side, y: _Side) -> float:
    """Return the area between the two quantile functions, which are steps of 1/n and 1/m."""
    u, v = x.sorted, y.sorted
    n, m = len(u), len(v)
    if n == m:
        return (u - v).abs().mean().item()
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1 / (n m)
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return (widths * (u[(ends - 1) // m] - v[(ends - 1) // n]).abs()).sum().item()


def _angle(u: Tensor, v: Tensor) -> float:
    """Return the angle in radians between two arrays of norm 1 or 0; unlike arccos, exact for tiny angles."""
    return 2 * math.atan2((u - v).norm().item(), (u + v).norm().item())


def _polar(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthogonal T that maximises <T, a>, and the maximum: the sum of the singular values."""
    u, s, vh = torch.linalg.svd(a)
    return u @ vh, s.sum(-1)


def _same_width(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = max(u.shape[1], v.shape[1])
    return pad(u, (0, width - u.shape[1])), pad(v, (0, width - v.shape[1]))


def _sides(x: Tensor, y: Tensor, labels: Tensor | None = None, *, jitter: float = JITTER) -> tuple[_Side, _Side]:
    one = _Side(x, labels, name="x", jitter=jitter)
    return one, _Side(y, labels, name="y", jitter=jitter, like=one)


class _Side:
    """One representation of a comparison; its factors are computed at first use."""

    def __init__(self, x: Tensor, labels: Tensor | None, *, name: str, jitter: float = JITTER,
                 like: _Side | None = None) -> None:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            raise ValueError(f"{name} is {getattr(x, 'dtype', type(x).__name__)}; give a tensor of floats, x.float()")
        if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give (N, P), at least 2 samples of at least 1 "
                             "feature: pool or flatten the rest")
        if like is not None and len(x) != len(like.raw):
            raise ValueError(f"{name} has {len(x)} samples, x has {len(like.raw)}; give the same samples to both")
        self.raw: Tensor = x.detach().to("cpu", torch.float64)
        if not self.raw.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; compute the activations in float32, or drop these samples")
        self.labels: Tensor | None = None
        if labels is not None:
            self.labels = _checked(labels, len(x)) if like is None or like.labels is None else like.labels
        self.jitter = jitter
        self._wider: dict[int, _Side] = {}

    @cached_property
    def centred(self) -> Tensor:  # (N, P); a constant feature becomes exactly 0
        c = self.raw - self.raw.mean(0)
        return torch.where(c.norm(dim=0) > 1e-13 * self.raw.norm(dim=0), c, 0.0)

    @cached_property
    def varies(self) -> bool:
        return bool(self.centred.any())

    @cached_property
    def direction(self) -> Tensor:  # (N, P), norm 1, or 0 for a constant representation
        return self.centred / self.centred.norm() if self.varies else self.centred

    @cached_property
    def gram_norm(self) -> Tensor:
        return (self.direction.T @ self.direction).norm()

    @cached_property
    def sorted(self) -> Tensor:  # (N * P,)
        return self.raw.flatten().sort().values

    @cached_property
    def _principal(self) -> tuple[Tensor, Tensor]:  # (N, rank) orthonormal, (rank,) singular values
        u, s, _ = torch.linalg.svd(self.direction, full_matrices=False)
        kept = s > ROUNDING * s[0]
        return u[:, kept], s[kept]

    @cached_property
    def rank(self) -> int:
        return len(self._principal[1])

    def whitened(self, alpha: float) -> Tensor:
        """Return the whitened features (N, rank), norm 1 or 0, up to a rotation, to which all callers are invariant."""
        u, s = self._principal
        partly = u * (alpha * s / s.square().mean().sqrt() + (1 - alpha)) if self.rank else u
        return partly / partly.norm() if self.rank else partly

    def widened(self, width: int) -> _Side:
        """Return this side padded with zeros to ``width`` features."""
        if width == self.raw.shape[1]:
            return self
        if width not in self._wider:
            wide = pad(self.raw, (0, width - self.raw.shape[1]))
            self._wider[width] = _Side(wide, self.labels, name="x", jitter=self.jitter, like=self)
        return self._wider[width]

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor, Tensor]:  # (C,) labels, (N,) class of each sample, (C,) sizes
        if self.labels is None:
            raise ValueError("labels are None; give the class of each sample, (N,) integers")
        return torch.unique(self.labels, return_inverse=True, return_counts=True)

    @cached_property
    def means(self) -> Tensor:  # (C, P)
        _, which, sizes = self.classes
        sums = torch.zeros(len(sizes), self.raw.shape[1], dtype=torch.float64).index_add_(0, which, self.raw)
        return sums / sizes[:, None]

    @cached_property
    def within(self) -> Tensor:  # (N, P) around the mean of the class, weighted so that products add up to covariances
        _, which, sizes = self.classes
        return (self.raw - self.means[which]) / (sizes - 1).clamp(min=1).sqrt()[which, None]

    @cached_property
    def roots(self) -> Tensor:  # (C, P, P) square roots of the covariances
        labels, which, sizes = self.classes
        if sizes.min() < 2:
            raise ValueError(f"class {labels[sizes.argmin()].item()} has a single sample and so no covariance; give it "
                             "more samples, leave it out, or compare means only (alpha=2)")
        covariances = torch.stack([w.T @ w for w in (self.within[which == c] for c in range(len(sizes)))])
        covariances.diagonal(dim1=1, dim2=2).add_(self.jitter)
        variances, axes = torch.linalg.eigh(covariances)
        return axes * variances.clamp(min=0).sqrt()[:, None] @ axes.mT

    @cached_property
    def frame(self) -> Tensor:  # (P, P) principal axes in columns; the third moment fixes the signs
        axes = torch.linalg.eigh(self.centred.T @ self.centred).eigenvectors
        return axes * torch.where((self.centred @ axes).pow(3).sum(0) < 0, -1.0, 1.0)


def _checked(labels: Tensor, N: int) -> Tensor:
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.shape != (N,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; give {N} integers, "
                         "one for each sample")
    return labels


# The Gaussian alignment.  With A, B the roots of the covariances of a class, Bures(S_x, T S_y T')^2 is
# |A|^2 + |B|^2 - 2 max <A T B, W> over orthogonal W, so the best T maximises a sum that is linear in T for fixed W and
# linear in every W for fixed T, and each maximum is a polar factor.  Alternating is monotone; momentum makes it faster.


@dataclass(frozen=True)
class _Clouds:
    """Objective of the alignment T: <T, linear> + weight * sum over classes of max over W of <a T b, W>."""

    linear: Tensor  # (P, P)
    weight: float
    a: Tensor  # (C, P, P)
    b: Tensor  # (C, P, P)
    most: float  # the maximum at distance 0

    def rough(self) -> _Clouds:
        """Return the objective in float32, scaled so that ``most`` is 1."""
        size = self.most**0.5
        return _Clouds((self.linear / self.most).float(), self.weight, (self.a / size).float(),
                       (self.b / size).float(), 1.0)

    def climb(self, T: Tensor, steps: int, polar: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Improve alignments T (S, P, P); return them and a lower bound (S,) of the objective of each."""
        ahead, value, run = T, T.new_full((len(T),), -torch.inf), T.new_zeros(len(T))
        for _ in range(steps):
            w = polar(self.a @ ahead[:, None] @ self.b)  # (S, C, P, P)
            after, reached = _polar(self.linear + self.weight * (self.a @ w @ self.b).sum(1))
            run = torch.where(reached < value, 0, run + 1)  # a decrease resets the momentum
            ahead = after + (run / (run + 3)).clamp(max=0.9)[:, None, None] * (after - T)
            little = (reached - value).abs() <= 1e-6 * (self.most - reached) + 4 * torch.finfo(T.dtype).eps * self.most
            T, value = after, reached
            if little.all():
                break
        return T, value


@_on_one_thread()
def _gaussian(x: _Side, y: _Side, *, alpha: float, starts: int | None = None, seed: int = 0) -> float:
    width = max(x.raw.shape[1], y.raw.shape[1])
    x, y = x.widened(width), y.widened(width)
    means = x.means.T @ y.means  # (P, P)
    if alpha == 2:
        return _root_mean(2 * (x.means - y.means @ _polar(means)[0].T).square().sum(1))
    most = sum(alpha * s.means.square().sum().item() + (2 - alpha) * s.roots.square().sum().item() for s in (x, y)) / 2
    if most == 0:
        return 0.0
    clouds = _Clouds(alpha * means, 2 - alpha, x.roots, y.roots, most)
    paired = _polar(clouds.linear + clouds.weight * x.within.T @ y.within)[0]
    T = torch.stack([_search(clouds, _starts(x, y, paired, starts=starts, seed=seed)), paired])
    turned = T[:, None] @ y.roots @ _polar(x.roots @ T[:, None] @ y.roots)[0].mT  # (2, C, P, P)
    bures = (x.roots - turned).square().sum((2, 3))
    between = (x.means - y.means @ T.mT).square().sum(2)  # (2, C)
    return min(map(_root_mean, alpha * between + (2 - alpha) * bures))


def _search(clouds: _Clouds, T: Tensor) -> Tensor:
    """Return the best alignment (P, P) from the starts T (S, P, P): few steps for all, more for the best ones."""
    S, rough = len(T), clouds.rough()
    T = _best(*rough.climb(T.float(), 4, _quick_polar), keep=max(2, S // 4))
    T = _best(*rough.climb(T, 8, _quick_polar), keep=max(1, S // 16))
    T = rough.climb(T, 100, _quick_polar)[0]
    return _best(*clouds.climb(T.double(), 40, lambda m: _polar(m)[0]), keep=1)[0]


def _best(T: Tensor, value: Tensor, *, keep: int) -> Tensor:
    return T[value.topk(min(keep, len(T))).indices]


def _starts(x: _Side, y: _Side, paired: Tensor, *, starts: int | None, seed: int) -> Tensor:
    """Return starting alignments (S, P, P): of samples, of means, identity, of principal axes, and random rotations.

    Swapping the sides transposes the set, since each random rotation comes with its inverse.  Rotating a side rotates
    all starts but the identity, so that the distance is invariant to rotations in spite of the search.
    """
    P = len(paired)
    starts = max(2, min(64, 500_000 // P**3)) if starts is None else starts
    noise = torch.randn(starts, P, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turns, none = _polar(noise)[0], torch.eye(P, dtype=torch.float64)[None]
    axes = x.frame @ torch.cat([none, turns, turns.mT]) @ y.frame.T
    return torch.cat([paired[None], _polar(x.means.T @ y.means)[0][None], none, axes])


def _quick_polar(m: Tensor) -> Tensor:
    """Return an approximate polar factor, by products only: singular values below 1 % of the norm stay below 1.

    Newton-Schulz steps; the coefficients of the first ones are those of K. Jordan's Muon optimizer (2024), which
    increase small values fast and keep large ones between 0.7 and 1.2; the last steps move these to 1 from below.
    """
    m = m / m.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)
    for _ in range(3):
        s = m @ m.mT
        m = 3.4445 * m + (-4.775 * s + 2.0315 * s @ s) @ m
    for _ in range(3):
        m = 1.5 * m - 0.5 * m @ m.mT @ m
    return m


def _root_mean(squares: Tensor) -> float:
    return squares.mean().sqrt().item()


METRICS: Table = Table("metric")
METRICS["cka"] = _entry(
    "1 - linear CKA: are the same samples similar in both?", _cka,
    "permutation", "rotation", "scale", "translation", triangle=False)
METRICS["gaussian_0"] = _entry(
    "shape of the class clouds: covariances only", _gaussian,
    "permutation", "rotation", "translation", needs_labels=True, alpha=0.0)
METRICS["gaussian_1"] = _entry(
    "place and shape of the class clouds: 2-Wasserstein", _gaussian,
    "permutation", "rotation", needs_labels=True, alpha=1.0)
METRICS["gaussian_2"] = _entry(
    "place of the class clouds: means only", _gaussian, "permutation", "rotation", needs_labels=True, alpha=2.0)
METRICS["permutation"] = _entry(
    "angle after matching features one to one", _permutation, "permutation", "scale", "translation")
METRICS["linear_shape_0"] = _entry(
    "angle after whitening: do both contain the same information up to a linear map?", _linear_shape,
    "permutation", "rotation", "linear", "scale", "translation", needs_samples=True, alpha=0.0)
METRICS["linear_shape_1"] = _entry(
    "angle after the best rotation (Procrustes)", _linear_shape,
    "permutation", "rotation", "scale", "translation", alpha=1.0)
METRICS["wasserstein"] = _entry(
    "do both contain the same values, at any place?", _wasserstein, "permutation")
