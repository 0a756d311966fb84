"""Solution of exercise 9."""

import torch


def root(s):
    """Return the symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh(s)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def bures(s, r):
    """Return the Bures distance of two covariance matrices."""
    a = root(s)
    square = s.trace() + r.trace() - 2 * root(a @ r @ a).trace()
    return max(0.0, square.item()) ** 0.5
