"""Ridge least squares from sums over tokens: the kept columns of a linear layer are re-solved after a cut.

A layer with C outputs and F inputs receives tokens x (F,).  The solution depends only on their Gram matrix and their
sum.  If the layer also corrects an error d (C,) of earlier layers, it depends on the product of x and d too.
References as in ``reconstruction``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning_lib.models.parts import matrix


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
        drift = self.drift and Residual(self.drift.cross.double(), self.drift.total, self.drift.size)
        return Gram(self.square.double(), self.total, self.tokens, drift)

    def centred(self) -> Tensor:
        """Return the Gram matrix (F, F) around the mean of x."""
        return self.square - torch.outer(self.total, self.total) / self.tokens

    def size(self, weight: Tensor, bias: Tensor) -> float:
        """Return the sum over tokens of the squared norm of ``weight x + bias``; weight (C, F), bias (C,)."""
        return float(((weight @ self.square) * weight).sum() + 2 * bias @ (weight @ self.total)
                     + self.tokens * bias.pow(2).sum())

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the sum over tokens of the squared norm of ``weight x + bias - d``."""
        if self.drift is None:
            return self.size(weight, bias)
        both = (weight * self.drift.cross.T).sum() + bias @ self.drift.total
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
        self.square.addmm_(x.T, x)
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
        return Gram(self.square, self.total, self.tokens, drift)


def solve(layer: nn.Linear, columns: Tensor, gram: Gram, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weight (C, F) with ``columns`` at zero and bias (C,) with the least output error; float64."""
    weight, bias = affine(layer)
    stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    stays[columns] = False
    G = gram.square if layer.bias is None else gram.centred()
    right = G[stays][:, ~stays] @ weight[:, ~stays].T
    if gram.drift is not None:
        means = 0 if layer.bias is None else torch.outer(gram.total, gram.drift.total) / gram.tokens
        right += (gram.drift.cross - means)[stays]
    new = torch.zeros_like(weight)
    new[:, stays] = weight[:, stays] + _ridge(G[stays][:, stays], right, ridge).T
    if layer.bias is not None:  # the mean output is unchanged, or corrected by the mean residual
        bias = bias + ((weight - new) @ gram.total + (0 if gram.drift is None else gram.drift.total)) / gram.tokens
    return new, bias


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
