"""The size of a module, as a number of parameters and in bytes."""

from __future__ import annotations

from torch import nn


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters of a module; shared ones count once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def whole_mean(counts: list[int]) -> float:
    """Return the mean of counts, a whole number where they are equal; 0 of none."""
    return sum(counts) / len(counts) if len(set(counts)) > 1 else next(iter(counts), 0)
