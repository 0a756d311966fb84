"""Everything a language model can go through to become smaller, in one call: heads, neurons, blocks, reconstruction.

Width (heads and neurons by a method of ``baselines.METHODS``), depth (blocks by a criterion of ``criteria.CRITERIA``),
or width and then depth, the idea of mixing them being MoP's.  All reach the same fraction of all parameters; blocks
come whole, so depth alone takes the nearest number of blocks and says what it reached.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pruning_lib.models import families, surgery
from pruning_lib.models.plan import Plan
from pruning_lib.pruning import consensus, importance
from pruning_lib.pruning.block_ranking import CRITERIA
from pruning_lib.pruning.reconstruction import MODES, RIDGES, Reconstruction, reconstruct
from pruning_lib.pruning.selection import Importance, choose

RECONSTRUCTIONS = ("none", *MODES)


@dataclass(frozen=True)
class Pruned:
    """A pruned language model and how it came about.

    Attributes
    ----------
    reached_fraction : of all parameters of the model pruning began with
    steps : what was removed, one sentence per step
    repairs : what reconstruction did, one entry per closing projection
    seconds : what took how long
    plan : which heads and neurons went; None for depth alone
    blocks : which whole blocks went, by their paths in the model that the width was cut of
    """

    model: nn.Module
    reached_fraction: float
    steps: tuple[str, ...]
    reconstructions: tuple[Reconstruction, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    plan: Plan | None = None
    blocks: tuple[str, ...] = ()


def prune(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, method: str = "amp",
          removed_fraction: float, heads_removed: int | None = None, grouped_query: str = "whole_groups",
          criterion: str = "none", blocks_removed: int = 0, reconstruction: str = "none",
          ridge: float | Sequence[float] = RIDGES, text: Iterable[Mapping[str, Tensor]] = (),
          multiple_of: int = 1, seed: int = 0) -> Pruned:
    """Remove ``removed_fraction`` of all parameters; ``model`` itself stays as it is.

    Parameters
    ----------
    batches : calibration prompts, as ``amp.batches`` makes them; what methods and criteria look at
    method : key of ``baselines.METHODS``, or ``"none"`` for depth alone
    heads_removed, grouped_query, multiple_of, seed : as in ``plans.choose``
    criterion : key of ``criteria.CRITERIA``, or ``"none"`` for width alone
    blocks_removed : with both a method and a criterion, how many blocks go after the width was cut; alone 0 takes the
        number of blocks nearest to the fraction
    reconstruction : ``"none"``, or re-solve the closing projections after the width was cut, in one of the modes of
        ``reconstruct.remove``: ``"one_pass"``, ``"sequential"``, ``"asymmetric"``
    ridge : for reconstruction; of several the best on held-out batches
    text : what reconstruction is solved on, and what methods look at that need long text; by default ``batches``

    Raises
    ------
    ValueError
        for unknown names, and for what cannot be reached.
    """
    batches, text = list(batches), list(text)
    _check(method, criterion, blocks_removed, reconstruction)
    if method == "none":
        return _depth(model, batches, criterion, removed_fraction, blocks_removed, seed)
    width_fraction = _left_for_width(model, removed_fraction, blocks_removed)

    def plan_of(scores: Importance) -> Plan:
        return choose(scores, model, removed_fraction=width_fraction, rule=importance.METHODS[method].rule,
                      heads_removed=heads_removed, grouped_query=grouped_query, multiple_of=multiple_of, seed=seed)

    plan_of(importance.uniform(model))  # what cannot be reached is refused before anything is measured
    start = time.perf_counter()
    seen = text if text and importance.METHODS[method].needs_text else batches
    plan = plan_of(importance.importances([method], model, seen)[method])
    seconds = {"scores_s": time.perf_counter() - start}
    reconstructions: list[Reconstruction] = []
    start = time.perf_counter()
    if reconstruction == "none":
        network = surgery.remove(model, plan)
    else:
        network, reconstructions = reconstruct(model, plan, text or batches, ridge=ridge,
                                             mode=reconstruction)
        seconds["reconstruction_s"] = time.perf_counter() - start
    steps: tuple[str, ...] = (f"{method}: {plan}",)
    blocks: tuple[str, ...] = ()
    if blocks_removed:
        network, blocks = _without_blocks(network, batches, criterion, blocks_removed, seed)
        steps += (_describe(criterion, blocks),)
    return Pruned(network, _reached(model, network), steps, tuple(reconstructions), seconds, plan, blocks)


def _check(method: str, criterion: str, blocks_removed: int, reconstruction: str) -> None:
    if reconstruction not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruction={reconstruction!r}; allowed: {', '.join(RECONSTRUCTIONS)}")
    for name, table in ((method, importance.METHODS), (criterion, CRITERIA)):
        if name != "none":
            table[name]  # an unknown name is refused here
    if method == criterion == "none":
        raise ValueError("method and criterion are both 'none': nothing would be removed; name at least one")
    if method == "none" and reconstruction != "none":
        raise ValueError("reconstruction re-solves what a width method cut; with method='none' give 'none'")
    if method != "none" and (criterion == "none") != (blocks_removed == 0):
        raise ValueError(f"criterion={criterion!r} and blocks_removed={blocks_removed}: to remove blocks after the "
                         f"width was cut give both, for width alone neither")


def _depth(model: nn.Module, batches: list, criterion: str, fraction: float, blocks_removed: int, seed: int) -> Pruned:
    wanted = blocks_removed or round(fraction * families.sizes(model).parameters / _block_parameters(model))
    network, blocks = _without_blocks(model, batches, criterion, wanted, seed)
    return Pruned(network, _reached(model, network), (_describe(criterion, blocks),), blocks=blocks)


def _describe(criterion: str, blocks: tuple[str, ...]) -> str:
    return f"{criterion}: removes {len(blocks)} blocks: {', '.join(blocks)}"


def _without_blocks(model: nn.Module, batches: list, criterion: str, count: int, seed: int
                    ) -> tuple[nn.Module, tuple[str, ...]]:
    """The model without the first ``count`` blocks of one order, and their paths; nothing is asked again in between."""
    consensus.validate(model, rounds=1, per_round=count, min_blocks=1)
    step = consensus.step(model, lambda network: CRITERIA[criterion].order(network, batches, None, seed),
                          per_round=count, min_blocks=1)
    return step.model, tuple(step.removed)


def _left_for_width(model: nn.Module, fraction: float, blocks_removed: int) -> float:
    """What the width has to lose so that the rest, with ``blocks_removed`` of the narrower blocks gone, fits."""
    s, block = families.sizes(model), _block_parameters(model)
    if not 0 <= blocks_removed < s.blocks:
        raise ValueError(f"blocks_removed={blocks_removed}; allowed: 0 to {s.blocks - 1}")
    narrow = (s.blocks * block - fraction * s.parameters) / (s.blocks - blocks_removed)  # parameters of a block left
    if narrow > block:
        most = int(fraction * s.parameters // block)
        raise ValueError(f"{blocks_removed} blocks are more than removed_fraction={fraction}; at most {most} fit")
    return s.blocks * (block - narrow) / s.parameters if blocks_removed else fraction


def _block_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in families.blocks(model)[0].parameters())


def _reached(model: Any, network: Any) -> float:
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, network))
    return 1 - after / before
