"""Pipeline: prunes the width and the depth of a language model, with reconstruction, in one call.

Width (heads and neurons by a method of ``importance.METHODS``), depth (blocks by a criterion of
``block_ranking.CRITERIA``), or width and then depth, a combination proposed by MoP.  All variants remove the same
fraction of all parameters; depth alone removes the nearest number of whole blocks and reports the fraction reached.
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
    """A pruned language model and the steps that produced it.

    Attributes
    ----------
    reached_fraction : removed fraction of all parameters of the original model
    steps : one sentence per removal step
    reconstructions : results of the reconstruction, one per output projection
    seconds : duration of each phase
    plan : removed heads and neurons; None for depth alone
    blocks : paths of the removed blocks, in the model after width pruning
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
    batches : calibration prompts, as returned by ``data.batches``, for methods and criteria
    method : key of ``importance.METHODS``, or ``"none"`` for depth alone
    heads_removed, grouped_query, multiple_of, seed : as in ``selection.choose``
    criterion : key of ``block_ranking.CRITERIA``, or ``"none"`` for width alone
    blocks_removed : with both a method and a criterion, number of blocks to remove after width pruning; for depth
        alone, 0 means the number of blocks nearest to ``removed_fraction``
    reconstruction : ``"none"``, or the mode in which ``reconstruction.reconstruct`` re-solves the output projections
        after width pruning: ``"one_pass"``, ``"sequential"``, ``"asymmetric"``
    ridge : ridge of the reconstruction; of several values, the best one on held-out batches is used
    text : calibration text of the reconstruction, and of methods that need long text; by default ``batches``

    Raises
    ------
    ValueError
        for unknown names, and for fractions that cannot be reached.
    """
    batches, text = list(batches), list(text)
    _check(method, criterion, blocks_removed, reconstruction)
    if method == "none":
        return _depth(model, batches, criterion, removed_fraction, blocks_removed, seed)
    width_fraction = _left_for_width(model, removed_fraction, blocks_removed)

    def plan_of(scores: Importance) -> Plan:
        return choose(scores, model, removed_fraction=width_fraction, rule=importance.METHODS[method].rule,
                      heads_removed=heads_removed, grouped_query=grouped_query, multiple_of=multiple_of, seed=seed)

    plan_of(importance.uniform(model))  # refuses an unreachable fraction before any measurement
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
        raise ValueError("method and criterion are both 'none', so nothing is removed; name at least one")
    if method == "none" and reconstruction != "none":
        raise ValueError("reconstruction is for width pruning; with method='none' give reconstruction='none'")
    if method != "none" and (criterion == "none") != (blocks_removed == 0):
        raise ValueError(f"criterion={criterion!r} and blocks_removed={blocks_removed}: give both to remove "
                         f"blocks after width pruning, or neither for width alone")


def _depth(model: nn.Module, batches: list, criterion: str, fraction: float, blocks_removed: int, seed: int) -> Pruned:
    wanted = blocks_removed or round(fraction * families.sizes(model).parameters / _block_parameters(model))
    network, blocks = _without_blocks(model, batches, criterion, wanted, seed)
    return Pruned(network, _reached(model, network), (_describe(criterion, blocks),), blocks=blocks)


def _describe(criterion: str, blocks: tuple[str, ...]) -> str:
    return f"{criterion}: removes {len(blocks)} blocks: {', '.join(blocks)}"


def _without_blocks(model: nn.Module, batches: list, criterion: str, count: int, seed: int
                    ) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model without the first ``count`` blocks of one ranking, and the paths of these blocks."""
    consensus.validate(model, rounds=1, per_round=count, min_blocks=1)
    step = consensus.step(model, lambda network: CRITERIA[criterion].order(network, batches, None, seed),
                          per_round=count, min_blocks=1)
    return step.model, tuple(step.removed)


def _left_for_width(model: nn.Module, fraction: float, blocks_removed: int) -> float:
    """Return the fraction to remove by width before ``blocks_removed`` narrower blocks are removed."""
    s, block = families.sizes(model), _block_parameters(model)
    if not 0 <= blocks_removed < s.blocks:
        raise ValueError(f"blocks_removed={blocks_removed}; allowed: 0 to {s.blocks - 1}")
    narrow = (s.blocks * block - fraction * s.parameters) / (s.blocks - blocks_removed)  # parameters of a kept block
    if narrow > block:
        most = int(fraction * s.parameters // block)
        raise ValueError(f"{blocks_removed} blocks are more than removed_fraction={fraction}; give at most {most}")
    return s.blocks * (block - narrow) / s.parameters if blocks_removed else fraction


def _block_parameters(model: nn.Module) -> int:
    return families.parameter_count(families.blocks(model)[0])


def _reached(model: Any, network: Any) -> float:
    return 1 - families.parameter_count(network) / families.parameter_count(model)
