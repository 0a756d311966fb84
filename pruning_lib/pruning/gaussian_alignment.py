"""The Gaussian shape distance: the clouds of all classes, compared after the best common rotation.

With A, B the roots of the covariances of a class, Bures(S_x, T S_y T')^2 is |A|^2 + |B|^2 - 2 max <A T B, W> over
orthogonal W, so the best T maximises a sum that is linear in T for fixed W and linear in every W for fixed T, and each
maximum is a polar factor.  Alternating is monotone; momentum makes it faster.
Order of this file: the distance · all features · the span of the samples · search · starts.

Fewer samples than features
---------------------------
N samples of P > N features are compared in the span of the samples, in r <= N dimensions, with the same result.
Let U (P, r) be an orthonormal basis of the rows of x and V one of the rows of y, both completed to
r = max(rank x, rank y) columns, so that x = a U' and y = b V'.  Without jitter an alignment T enters only through
K = U' T V, a contraction: ``|S_x^1/2 T S_y^1/2|_*`` is ``|A K B|_*`` with the roots A, B of the covariances of a and b,
and the means add a term linear in K.  This sum over classes is convex in K, so among the contractions it is largest at
an extreme point; the extreme points are the orthogonal r x r matrices, and each is U' T V of an orthogonal T.
So the distance of x and y is that of a and b.
With jitter e > 0, let T map U to V K' and the complement of one span to that of the other: it adds e (P - r) to each
trace and to each fidelity, and these cancel, so that each K has for a and b exactly the value of such a T for x and y.
The only difference left is that a T which mixes a span with its complement might be better.  This takes variances of
the order of the jitter, and the effect vanishes with it.
A class of n samples has a covariance of rank below n, so a step takes singular values of n x n matrices per class, and
one r x r polar factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pruning_lib.pruning.sides import Side, on_one_thread, polar

Polar = Callable[[Tensor], Tensor]


@on_one_thread()
def aligned_distance(x: Side, y: Side, *, alpha: float, starts: int | None = None, seed: int = 0) -> float:
    """Return the distance that ``similarity.gaussian_distance`` documents."""
    if len(x.raw) < max(x.raw.shape[1], y.raw.shape[1]):
        x, y = x.in_span, y.in_span
    width = max(x.raw.shape[1], y.raw.shape[1])
    x, y = x.widened(width), y.widened(width)
    means = x.means.T @ y.means  # (P, P)
    if alpha == 2:
        return _root_mean(2 * (x.means - y.means @ polar(means)[0].T).square().sum(1))
    x.refuse_single_samples()
    compare = _compare_in_span if x.spans else _compare
    return compare(x, y, alpha * means, alpha, starts, seed)


# --- all features -----------------------------------------------------------------------------------------------------


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

    def improve(self, T: Tensor, polar_of: Polar) -> tuple[Tensor, Tensor]:
        """Return better alignments than T (S, P, P), and a lower bound (S,) of the objective of each."""
        w = polar_of(self.a @ T[:, None] @ self.b)  # (S, C, P, P)
        return polar(self.linear + self.weight * (self.a @ w @ self.b).sum(1))


def _compare(x: Side, y: Side, linear: Tensor, alpha: float, starts: int | None, seed: int) -> float:
    most = sum(alpha * s.means.square().sum().item() + (2 - alpha) * s.roots.square().sum().item() for s in (x, y)) / 2
    if most == 0:
        return 0.0
    clouds = _Clouds(linear, 2 - alpha, x.roots, y.roots, most)
    paired = polar(clouds.linear + clouds.weight * x.within.T @ y.within)[0]
    T = torch.stack([_search(clouds, _starts(x, y, paired, starts=starts, seed=seed)), paired])
    turned = T[:, None] @ y.roots @ polar(x.roots @ T[:, None] @ y.roots)[0].mT  # (2, C, P, P)
    bures = (x.roots - turned).square().sum((2, 3))
    between = (x.means - y.means @ T.mT).square().sum(2)  # (2, C)
    return min(map(_root_mean, alpha * between + (2 - alpha) * bures))


# --- the span of the samples ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples:
    """The objective of ``_Clouds`` without jitter, from the samples: |S_x^1/2 T S_y^1/2|_* is |u T v'|_*."""

    linear: Tensor  # (P, P)
    weight: float
    u: Tensor  # (C, n, P) samples of x around the mean of their class, weighted; zeros where a class has fewer than n
    v: Tensor
    most: float

    def rough(self) -> _Samples:
        """Return the objective in float32, scaled so that ``most`` is 1."""
        size = self.most**0.5
        return replace(self, linear=(self.linear / self.most).float(), u=(self.u / size).float(),
                       v=(self.v / size).float(), most=1.0)

    def improve(self, T: Tensor, polar_of: Polar) -> tuple[Tensor, Tensor]:
        """Return better alignments than T (S, P, P), and a lower bound (S,) of the objective of each."""
        w = polar(self.u @ T[:, None] @ self.v.mT)[0]  # (S, C, n, n)
        pulls = self.u.flatten(0, 1).T @ (w @ self.v).flatten(1, 2)  # (S, P, P), the sum over classes
        return polar(self.linear + self.weight * pulls)


def _compare_in_span(x: Side, y: Side, linear: Tensor, alpha: float, starts: int | None, seed: int) -> float:
    most = sum(alpha * s.means.square().sum().item() + (2 - alpha) * s.within.square().sum().item() for s in (x, y)) / 2
    if most == 0:
        return 0.0
    samples = _Samples(linear, 2 - alpha, x.by_class, y.by_class, most)
    paired = polar(linear + samples.weight * x.within.T @ y.within)[0]
    few = (2 if len(paired) < 128 else 0) if starts is None and len(paired) > 54 else starts
    found = [_search(samples, _starts(x, y, paired, starts=few, seed=seed)), paired]
    squares = [alpha * (x.means - y.means @ T.T).square().sum(1) + (2 - alpha) * _bures(x, y, T) for T in found]
    return min(map(_root_mean, squares))


def _bures(x: Side, y: Side, T: Tensor) -> Tensor:
    """Return Bures(S_x, T S_y T')^2 of every class (C,), jitter included.

    The roots are ``sqrt(jitter)`` plus a matrix of rank below n, so they differ in the span of both clouds only.
    """
    floor, found = x.jitter**0.5, []
    for (axes_x, gain_x), (axes_y, gain_y) in zip(x.axes_by_class, y.axes_by_class, strict=True):
        axes_x = T.T @ axes_x  # (P, k) in the coordinates of y
        basis = torch.linalg.qr(torch.cat([axes_x, axes_y], 1))[0]  # (P, 2k), or (P, P)
        a, b = (floor * torch.eye(basis.shape[1], dtype=T.dtype) + (p * gain) @ p.T
                for p, gain in ((basis.T @ axes_x, gain_x), (basis.T @ axes_y, gain_y)))
        found.append((a - b @ polar(a @ b)[0].T).square().sum())
    return torch.stack(found)


# --- search -----------------------------------------------------------------------------------------------------------

Self = TypeVar("Self")


class _Objective(Protocol):
    @property
    def most(self) -> float: ...
    def rough(self: Self) -> Self: ...
    def improve(self, T: Tensor, polar_of: Polar) -> tuple[Tensor, Tensor]: ...


def _search(objective: _Objective, T: Tensor) -> Tensor:
    """Return the best alignment (P, P) from the starts T (S, P, P): few steps for all, more for the best ones."""
    S, rough = len(T), objective.rough()
    T = _best(*_climb(rough, T.float(), 4, _quick_polar), keep=max(2, S // 4))
    T = _best(*_climb(rough, T, 8, _quick_polar), keep=max(1, S // 16))
    T = _climb(rough, T, 100, _quick_polar)[0]
    return _best(*_climb(objective, T.double(), 40, lambda m: polar(m)[0]), keep=1)[0]


def _climb(objective: _Objective, T: Tensor, steps: int, polar_of: Polar) -> tuple[Tensor, Tensor]:
    """Improve alignments T (S, P, P); return them and a lower bound (S,) of the objective of each."""
    ahead, value, run = T, T.new_full((len(T),), -torch.inf), T.new_zeros(len(T))
    for _ in range(steps):
        after, reached = objective.improve(ahead, polar_of)
        run = torch.where(reached < value, 0, run + 1)  # a decrease resets the momentum
        ahead = after + (run / (run + 3)).clamp(max=0.9)[:, None, None] * (after - T)
        rounding = 4 * torch.finfo(T.dtype).eps * objective.most
        little = (reached - value).abs() <= 1e-6 * (objective.most - reached) + rounding
        T, value = after, reached
        if little.all():
            break
    return T, value


def _best(T: Tensor, value: Tensor, *, keep: int) -> Tensor:
    return T[value.topk(min(keep, len(T))).indices]


def _starts(x: Side, y: Side, paired: Tensor, *, starts: int | None, seed: int) -> Tensor:
    """Return starting alignments (S, P, P): of samples, of means, identity, of principal axes, and random rotations.

    Swapping the sides transposes the set, since each random rotation comes with its inverse.  Rotating a side rotates
    all starts but the identity, so that the distance is invariant to rotations in spite of the search.
    """
    P = len(paired)
    starts = max(2, min(64, 500_000 // P**3)) if starts is None else starts
    noise = torch.randn(starts, P, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turns, none = polar(noise)[0], torch.eye(P, dtype=torch.float64)[None]
    axes = x.frame @ torch.cat([none, turns, turns.mT]) @ y.frame.T
    return torch.cat([paired[None], polar(x.means.T @ y.means)[0][None], none, axes])


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
