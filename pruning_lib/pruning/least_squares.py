"""Ridge least squares from sums over tokens: the kept columns of a linear layer are re-solved after a cut.

A layer with C outputs and F inputs receives tokens x (F,).  The solution depends only on their Gram matrix and their
sum.  If the layer also corrects an error d (C,) of earlier layers, it depends on the product of x and d too.
References as in ``reconstruction``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pruning_lib.models.parts import matrix

PANEL = 192  # columns of a symmetric matrix computed at a time: fewer are slow, more compute much of it twice


@dataclass(frozen=True)
class Residual:
    """Sums over tokens of the residual d (C,), the error of earlier layers that a layer has to correct."""

    cross: Tensor  # (F, C) of x d^T
    total: Tensor  # (C,) of d
    size: float  # sum of the squared norm of d


@dataclass(frozen=True)
class Gram:
    """Sums over tokens of the inputs x (F,) of one layer: the data of its least-squares problem."""

    square: Tensor  # (F, F) of x x^T
    total: Tensor  # (F,) of x
    tokens: int
    drift: Residual | None = None

    def double(self) -> Gram:
        """Return the sums in float64."""
        return self.to(torch.float64)

    def to(self, dtype: torch.dtype) -> Gram:
        """Return the sums with the products in ``dtype``; single sums stay in float64."""
        drift = self.drift and Residual(self.drift.cross.to(dtype), self.drift.total, self.drift.size)
        return Gram(self.square.to(dtype), self.total, self.tokens, drift)

    def without(self, columns: Tensor, weight: Tensor) -> Gram:
        """Return the sums over the other columns; the share of ``columns`` in the output is added to the residual.

        Parameters
        ----------
        columns : removed columns of x
        weight : (C, F) of the layer; its dtype is that of the products in the result
        """
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[columns] = False
        gone, rows = weight[:, ~stays], self.square[stays].to(weight.dtype)  # (C, removed), (kept, F)
        cross, total = rows[:, ~stays] @ gone.T, self.total[~stays] @ gone.double().T
        size = ((gone @ self.square[~stays][:, ~stays].to(weight.dtype)) * gone).sum(dtype=torch.float64)
        if self.drift is not None:
            size += 2 * (gone * self.drift.cross[~stays].T).sum(dtype=torch.float64) + self.drift.size
            cross += self.drift.cross[stays]
            total += self.drift.total
        return Gram(rows[:, stays], self.total[stays], self.tokens, Residual(cross, total, float(size)))

    def centred(self) -> Tensor:
        """Return the Gram matrix (F, F) around the mean of x."""
        return (self.square - torch.outer(self.total, self.total) / self.tokens).to(self.square.dtype)

    def size(self, weight: Tensor, bias: Tensor) -> float:
        """Return the sum over tokens of the squared norm of ``weight x + bias``; weight (C, F), bias (C,)."""
        products = ((weight @ self.square) * weight).sum(dtype=torch.float64)
        weight, bias = weight.double(), bias.double()
        return float(products + 2 * bias @ (weight @ self.total) + self.tokens * bias.pow(2).sum())

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the sum over tokens of the squared norm of ``weight x + bias - d``."""
        if self.drift is None:
            return self.size(weight, bias)
        both = (weight * self.drift.cross.T).sum(dtype=torch.float64) + bias.double() @ self.drift.total
        return self.size(weight, bias) - 2 * float(both) + self.drift.size


class GramAccumulator:
    """Running sums of a ``Gram``, batch by batch."""

    def __init__(self, layer: nn.Linear) -> None:
        weight = matrix(layer)
        C, F = weight.shape
        self.kind = torch.promote_types(weight.dtype, torch.float32)
        self.square = weight.new_zeros(F, F, dtype=self.kind)
        self.total, self.drift_total, self.drift_size = (weight.new_zeros(n, dtype=torch.float64) for n in (F, C, 1))
        self.tokens = 0
        self.cross: Tensor | None = None

    def add(self, x: Tensor, d: Tensor | None = None) -> None:
        """Add tokens x (T, F), and residuals d (T, C) of the output."""
        x = x.to(self.kind)
        self.tokens += len(x)
        for start in range(0, x.shape[1], PANEL):  # the part above the diagonal is its mirror image
            end = start + PANEL
            self.square[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])
        self.total += x.sum(0, dtype=torch.float64)
        if d is not None:
            d = d.to(self.kind)
            self.cross = x.T @ d if self.cross is None else self.cross.addmm_(x.T, d)
            self.drift_total += d.sum(0, dtype=torch.float64)
            self.drift_size += d.pow(2).sum(dtype=torch.float64)

    def gram(self) -> Gram:
        """Return the sums; raise ValueError for activations that are not finite."""
        if not torch.isfinite(self.square).all():
            raise ValueError("activations are not finite; load the model in float32 or bfloat16, not float16")
        drift = None if self.cross is None else Residual(self.cross, self.drift_total, float(self.drift_size))
        for end in range(PANEL, len(self.square), PANEL):
            self.square[end - PANEL:end, end:] = self.square[end:, end - PANEL:end].T
        return Gram(self.square, self.total, self.tokens, drift)


def solve(layer: nn.Linear, columns: Tensor, gram: Gram, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weight (C, F) with ``columns`` at zero and bias (C,) with the least output error; float64."""
    weight, bias = affine(layer)
    change, shift = solution(gram.without(columns, weight), ridge, bias=layer.bias is not None)
    return changed(weight, columns, change), bias + shift


def changed(weight: Tensor, columns: Tensor, change: Tensor) -> Tensor:
    """Return weight (C, F) with ``columns`` at zero and ``change`` (C, kept) added to the others."""
    stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    stays[columns] = False
    new = torch.zeros_like(weight)
    new[:, stays] = weight[:, stays] + change
    return new


def solution(gram: Gram, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor]:
    """Return the change of the weights (C, F) and of the bias (C,), 0 without one, that adds the residual best."""
    drift = gram.drift
    assert drift is not None
    if not bias:
        return _ridge(gram.square, drift.cross, ridge).T, torch.zeros_like(drift.total, dtype=gram.square.dtype)
    right = drift.cross - (torch.outer(gram.total, drift.total) / gram.tokens).to(drift.cross.dtype)
    change = _ridge(gram.centred(), right, ridge).T
    return change, ((drift.total - change.double() @ gram.total) / gram.tokens).to(change.dtype)


def best_ridge(layer: nn.Linear, columns: Tensor, fit: Gram, judge: Gram, ridges: Sequence[float], *,
               first: float | None = None) -> float:
    """Return the ridge whose solution on ``fit`` has the least error on ``judge``.

    The error falls towards the best ridge and rises behind it, so the search begins at ``first`` and goes downhill.  It
    runs in float32; ridges within a thousandth of the best are compared in float64.

    Parameters
    ----------
    ridges : penalties, relative to the mean diagonal of the Gram matrix of the kept columns
    first : the ridge to begin with, such as that of the layer before
    """
    ridges, (weight, _) = sorted(ridges), affine(layer)

    @cache
    def sums(dtype: torch.dtype) -> list[Gram]:
        return [gram.without(columns, weight.to(dtype)) for gram in (fit, judge)]

    @cache
    def error(i: int, dtype: torch.dtype) -> float:
        seen, held = sums(dtype)
        inside = 0 <= i < len(ridges)
        return held.error(*solution(seen, ridges[i], bias=layer.bias is not None)) if inside else math.inf

    rough = torch.float64 if ridges[0] == 0 else torch.float32  # without a ridge float32 may find no solution
    best, at = -1, ridges.index(first) if first in ridges else len(ridges) // 2
    while best != at:
        best, at = at, min((at, at - 1, at + 1), key=lambda i: error(i, rough))
    near = [i for i in (at, at - 1, at + 1) if error(i, rough) <= 1.001 * error(at, rough)]
    return ridges[at if len(near) == 1 else min(near, key=lambda i: error(i, torch.float64))]


def _ridge(G: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Return ``inverse(G + ridge) right``; without ridge the minimum-norm solution, since G may be singular."""
    if ridge == 0:
        return torch.linalg.lstsq(G.cpu(), right.cpu(), driver="gelsd").solution.to(G.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped(G, ridge)))


def damped(G: Tensor, ridge: float) -> Tensor:
    """Return G with ``ridge`` times its mean diagonal added to the diagonal."""
    pulled = G.clone()
    pulled.diagonal().add_(ridge * G.diagonal().mean() + torch.finfo(G.dtype).tiny)  # tiny: G may be 0
    return pulled


def cost_alone(G: Tensor, weight: Tensor, width: int) -> Tensor:
    """Return the error (F / width,) of removing each unit alone, after the other columns are re-solved."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G))
    units = torch.arange(len(G), device=G.device).view(-1, width)
    return torch.stack([(weight[:, u].T * torch.linalg.solve(inverse[u][:, u], weight[:, u].T)).sum() for u in units])


def cost_in_turn(G: Tensor, weight: Tensor) -> Tensor:
    """Return the cumulative error (F,) at the removal of each column, removing the cheapest one each time.

    ``inverse(G)`` and the weights are updated after every removed column, as in [2]_.
    """
    inverse, weight = torch.cholesky_inverse(torch.linalg.cholesky(G)), weight.clone()
    left, score, spent = torch.arange(len(G), device=G.device), G.new_zeros(len(G)), G.new_zeros(())
    while len(left):
        gone = torch.zeros(len(left), dtype=torch.bool, device=G.device)
        for _ in range(min(64, len(left))):  # the matrices are copied without the removed columns once per 64
            error = weight.pow(2).sum(0) / inverse.diagonal()
            cheapest = error.masked_fill(gone, torch.inf).argmin()
            spent = spent + error[cheapest]
            score[left[cheapest]], gone[cheapest] = spent, True
            repair = inverse[cheapest] / inverse[cheapest, cheapest]
            weight.addr_(weight[:, cheapest].clone(), repair, alpha=-1)
            inverse.addr_(inverse[:, cheapest].clone(), repair, alpha=-1)
        left, weight, inverse = left[~gone], weight[:, ~gone], inverse[~gone][:, ~gone]
    return score


def affine(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return copies of weight (C, F) and bias (C,) of a layer in float64; zeros without a bias."""
    weight = matrix(layer).detach().clone().double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone().double()
