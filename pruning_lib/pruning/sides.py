"""One side of a comparison: a representation and its factors, each computed once, and the algebra the metrics share.

A representation is a matrix of features (N, P) with one row per sample.  All computations are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from pruning_lib.data.labelled_images import class_numbers

JITTER = 1e-6  # added to the variances, in squared units of the features
ROUNDING = 1e-6  # directions with a smaller share of the largest singular value are float32 rounding errors


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Use one thread: for small matrices a second one is useless, and on a busy machine tens of times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def angle(u: Tensor, v: Tensor) -> float:
    """Return the angle in radians between two arrays of norm 1 or 0; unlike arccos, exact for tiny angles."""
    return 2 * math.atan2((u - v).norm().item(), (u + v).norm().item())


def polar(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthogonal T that maximises <T, a>, and the maximum: the sum of the singular values."""
    u, s, vh = torch.linalg.svd(a)
    return u @ vh, s.sum(-1)


def same_width(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = max(u.shape[1], v.shape[1])
    return pad(u, (0, width - u.shape[1])), pad(v, (0, width - v.shape[1]))


def sides(x: Tensor, y: Tensor, labels: Tensor | None = None, *, jitter: float = JITTER) -> tuple[Side, Side]:
    one = Side(x, labels, name="x", jitter=jitter)
    return one, Side(y, labels, name="y", jitter=jitter, like=one)


class Side:
    """One representation of a comparison; its factors are computed at first use."""

    def __init__(self, x: Tensor, labels: Tensor | None, *, name: str, jitter: float = JITTER,
                 like: Side | None = None) -> None:
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
        self.spans = False  # whether the features are coordinates in the span of the samples
        self._wider: dict[int, Side] = {}

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

    def widened(self, width: int) -> Side:
        """Return this side padded with zeros to ``width`` features."""
        if width == self.raw.shape[1]:
            return self
        if width not in self._wider:
            wide = pad(self.raw, (0, width - self.raw.shape[1]))
            self._wider[width] = Side(wide, self.labels, name="x", jitter=self.jitter, like=self)
            self._wider[width].spans = self.spans
        return self._wider[width]

    @cached_property
    def in_span(self) -> Side:
        """Return this side in coordinates (N, rank) of the span of its samples, with the same inner products."""
        squares, axes = torch.linalg.eigh(self.raw @ self.raw.T)  # (N,) ascending, (N, N)
        kept = squares > 1e-13 * squares[-1].clamp(min=1e-300)
        kept[-1] = True  # a representation of zeros keeps one feature
        axes = axes * torch.where(axes.pow(3).sum(0) < 0, -1.0, 1.0)  # signs that a rotation of the features keeps
        side = Side(axes[:, kept] * squares[kept].clamp(min=0).sqrt(), self.labels, name="x", jitter=self.jitter,
                    like=self)
        side.spans = True
        return side

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

    def refuse_single_samples(self) -> None:
        """Raise ValueError if a class has a single sample, which has no covariance."""
        labels, _, sizes = self.classes
        if sizes.min() < 2:
            raise ValueError(f"class {labels[sizes.argmin()].item()} has a single sample and so no covariance; give it "
                             "more samples, leave it out, or compare means only (alpha=2)")

    @cached_property
    def roots(self) -> Tensor:  # (C, P, P) square roots of the covariances
        _, which, sizes = self.classes
        covariances = torch.stack([w.T @ w for w in (self.within[which == c] for c in range(len(sizes)))])
        covariances.diagonal(dim1=1, dim2=2).add_(self.jitter)
        variances, axes = torch.linalg.eigh(covariances)
        return axes * variances.clamp(min=0).sqrt()[:, None] @ axes.mT

    @cached_property
    def by_class(self) -> Tensor:  # (C, n, P) ``within`` class by class; zeros where a class has fewer than n samples
        _, which, sizes = self.classes
        found = torch.zeros(len(sizes), int(sizes.max()), self.raw.shape[1], dtype=torch.float64)
        for c, size in enumerate(sizes.tolist()):
            found[c, :size] = self.within[which == c]
        return found

    @cached_property
    def axes_by_class(self) -> list[tuple[Tensor, Tensor]]:
        """Return per class orthonormal axes (P, k) and gains (k,): a root is sqrt(jitter) + axes * gains @ axes.T."""
        found = []
        for rows in self.by_class:
            _, s, axes = torch.linalg.svd(rows, full_matrices=False)
            kept = s > 0
            found.append((axes[kept].T, (s[kept].square() + self.jitter).sqrt() - self.jitter**0.5))
        return found

    @cached_property
    def frame(self) -> Tensor:  # (P, P) principal axes in columns; the third moment fixes the signs
        axes = torch.linalg.eigh(self.centred.T @ self.centred).eigenvectors
        return axes * torch.where((self.centred @ axes).pow(3).sum(0) < 0, -1.0, 1.0)


def _checked(labels: Tensor, N: int) -> Tensor:
    found = class_numbers(labels)
    if len(found) != N:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; give {N} integers, one for each sample")
    return found
