"""A function of the user's own as the score of a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pruning_lib.pruning.selection import Importance


def importance_from(function: Callable[..., Any], name: str) -> Callable[[nn.Module, Any], Importance]:
    """Return ``function`` as an importance: its result is an ``Importance``, or scores of heads and of neurons.

    Raises
    ------
    ValueError
        when the importance is called and the function returns something else.
    """
    def scores(model: nn.Module, batches: Any) -> Importance:
        found = function(model, batches)
        if isinstance(found, Importance):
            return found
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
            raise ValueError(f"{name} returned a {type(found).__name__}; wanted an Importance, or two tensors: scores "
                             f"of heads (L, H) and of neurons (L, M)")
        heads, neurons = (part.detach().float().cpu() for part in found)
        return Importance(heads, neurons, {"method": name})

    return scores
