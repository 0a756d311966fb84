"""What AMP is compared with, and AMP itself, under one roof: a method is an importance and a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning_lib import amp, families
from pruning_lib.plans import Importance
from pruning_lib.registry import Table


@dataclass(frozen=True)
class Method:
    """How importances are measured and which ones go."""

    importance: Callable[[nn.Module, Iterable[Mapping[str, Tensor]]], Importance]
    rule: str
    about: str


METHODS: Table = Table("method")


def magnitude(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = ()) -> Importance:
    """L2 norm of the weights of each head (query rows and output columns) and neuron; looks at no data.

    Returns
    -------
    Importance with heads (L, H) and neurons (L, M)
    """
    family, D = families.of(model), families.head_width(model)
    heads, neurons = [], []
    for block in families.blocks(model):
        queries, out = (families.linear(block, p).weight.detach().float() for p in (family.queries, family.heads_out))
        heads.append((queries.pow(2).sum(1) + out.pow(2).sum(0)).view(-1, D).sum(1).sqrt())
        size = families.linear(block, family.neurons_out).weight.detach().float().pow(2).sum(0)
        for path in family.neurons_in:
            size = size + families.linear(block, path).weight.detach().float().pow(2).sum(1)
        neurons.append(size.sqrt())
    return Importance(torch.stack(heads).cpu(), torch.stack(neurons).cpu(), {"method": "magnitude"})


def nothing(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = ()) -> Importance:
    """All parts equally important: for rules that do not look."""
    s = families.sizes(model)
    return Importance(torch.zeros(s.blocks, s.heads), torch.zeros(s.blocks, s.neurons), {"method": "nothing"})


METHODS["amp"] = Method(amp.importance, "lowest", "least projected activation goes (the paper's method)")
METHODS["highest"] = Method(amp.importance, "highest", "AMP reversed: the most important goes (a control)")
METHODS["random"] = Method(nothing, "random", "any head or neuron goes (a control)")
METHODS["magnitude"] = Method(magnitude, "lowest", "smallest weights go, whatever the data")


def importances(methods: Iterable[str], model: nn.Module, batches: Iterable[Mapping[str, Tensor]]
                ) -> dict[str, Importance]:
    """Importances for several methods; what two methods share is measured once."""
    functions = {name: METHODS[name].importance for name in methods}  # a name that is unknown is refused here
    batches, measured = list(batches), {}
    for function in functions.values():
        if function not in measured:
            measured[function] = function(model, batches)
    return {name: measured[function] for name, function in functions.items()}
