"""Consensus: ranks residual blocks by the change of the representation without them.

Idea: skip one block and measure the change of the features before the classifier by several different metrics; rank
the blocks by every metric, add the ranks, remove the block with the smallest sum [1]_.
Order of this file: representations · scores · rank · prune · selection of blocks.
Metrics are in ``similarity``, cutting is in ``surgery``.

References
----------
.. [1] Mugnaini et al., "Layer Pruning with Consensus: A Triple-Win Solution", 2024, arXiv 2411.14345.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib._extras import Lazy
from pruning_lib.data.labelled_images import have_labels, inputs_for, labelled_batches
from pruning_lib.models import families, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.hooks import evaluating, inputs_to, resume_after
from pruning_lib.pruning import similarity

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Lazy("pandas", "vision")  # a ranking does without tables

Batch = Tensor | Mapping[str, Tensor]


def representations(model: nn.Module, inputs: Any, blocks: Sequence[str] | None = None, *,
                    images_per_batch: int = 128, progress: bool = True) -> tuple[Tensor, Tensor]:
    """Return the penultimate features of the network, and of the network without each block.

    The blocks before block ``i`` run once: the features without block ``i`` are computed by passing the input of block
    ``i`` to the blocks behind it.  They equal, bit for bit, those of a full pass with the block skipped.

    Parameters
    ----------
    inputs : (N, channels, height, width) pixels in [0, 1]; a data set such as ImageFolder, a DataLoader, or batches of
        images with or without labels; for a language model batches are dicts of ``input_ids`` and ``attention_mask``,
        each (B, T), padded on the right
    blocks : names of the blocks to leave out, one at a time; all removable ones by default

    Returns
    -------
    (N, P) and (blocks, N, P) float32 on the CPU; of a language model, the features of each prompt's last token

    Raises
    ------
    ValueError
        for no inputs, inputs that the network does not take, or a name that is no removable block.
    """
    return labelled_representations(model, inputs, None, blocks, images_per_batch, progress)[:2]


def labelled_representations(model: nn.Module, inputs: Any, labels: Any = None, blocks: Sequence[str] | None = None,
                             images_per_batch: int = 128, progress: bool = True
                             ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``representations`` and the class of each sample (N,), or None where there are no labels."""
    infos = families.residual_blocks(model)
    removable = [b.name for b in infos if b.removable]
    blocks = removable if blocks is None else list(blocks)
    if not set(blocks) <= set(removable):
        raise ValueError(f"{', '.join(sorted(set(blocks) - set(removable)))} cannot be removed; "
                         f"removable: {', '.join(removable)}")
    modules = [model.get_submodule(families.unit(model, name).block) for name in blocks]
    whole: list[Tensor] = []
    classes: list[Tensor | None] = []
    without: list[list[Tensor]] = [[] for _ in blocks]
    batches = labelled_batches(inputs, labels, size=images_per_batch)
    with torch.inference_mode(), evaluating(model):
        for batch, some in tqdm(batches, desc="representations", disable=not progress, leave=False):
            entered: dict[int, Tensor] = {}
            # copied: a block of any network may work in place on its input
            with inputs_to(modules, partial(_keep, entered)):
                whole.append(penultimate(model, batch))
            classes.append(some)
            for i, (found, name) in enumerate(zip(without, blocks, strict=True)):
                with resume_after(model, name, entered.pop(i)):
                    found.append(penultimate(model, batch))
    if not whole:
        raise ValueError("no inputs: give at least two images or prompts")
    known = [some for some in classes if some is not None]
    return (torch.cat(whole), torch.stack([torch.cat(found) for found in without]) if blocks else torch.empty(0),
            torch.cat(known) if len(known) == len(classes) else None)


def _keep(entered: dict[int, Tensor], i: int, x: Tensor) -> None:
    entered[i] = x.clone()


def penultimate(model: nn.Module, batch: Batch) -> Tensor:
    """Return the input of the classifier, (B, P) float32 on the CPU; in a language model for the last token only."""
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        caught: list[Tensor] = []
        with inputs_to([families.classifier(model)], lambda _, x: caught.append(x)):
            model(inputs_for(model, batch).to(device))
        return caught[0].flatten(1).float().cpu()
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    families.classifier(model)  # raises for a model of no family
    hidden: Any = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    last = mask.sum(1) - 1
    return hidden.last_hidden_state[torch.arange(len(last), device=device), last].float().cpu()


def scores(model: nn.Module, inputs: Any, labels: Any = None, *, metrics: Sequence[str] | None = None,
           images_per_batch: int = 128, progress: bool = True) -> pd.DataFrame:
    """Return the change of the representation without each block: a row per removable block, a column per metric.

    Parameters
    ----------
    inputs : as in ``representations``
    labels : (N,) class of each input, for metrics that compare classes; None where the inputs hold them
    metrics : keys of ``similarity.METRICS``; by default those of the paper, ``similarity.PAPER_METRICS``, that are
        defined for these inputs: metrics that compare classes need labels, ``linear_shape_0`` more samples than
        features (a warning is given if it is left out)
    progress : show bars, and state the expected time of the metrics before they are computed if it is long

    Raises
    ------
    ValueError
        for an unknown metric, a metric that needs missing labels, or a network without removable blocks.
    """
    names, found = changes(model, inputs, labels, metrics=metrics, images_per_batch=images_per_batch, progress=progress)
    return pd.DataFrame({name: x.numpy() for name, x in found.items()}, index=pd.Index(names, name="block"))


def changes(model: nn.Module, inputs: Any, labels: Any = None, *, metrics: Sequence[str] | None = None,
            images_per_batch: int = 128, progress: bool = True) -> tuple[list[str], dict[str, Tensor]]:
    """Return the names of the removable blocks, and metric -> (blocks,) changes; arguments as in ``scores``."""
    known = have_labels(inputs, labels)
    chosen = _chosen(metrics, known is not False)
    names = [b.name for b in families.residual_blocks(model) if b.removable]
    if not names:
        raise ValueError("no block of this network keeps the shape of its input, so none can be removed")
    whole, without, classes = labelled_representations(model, inputs, labels, names, images_per_batch, progress)
    if known is None:
        chosen = _chosen(metrics, classes is not None)
    if metrics is None:
        chosen = _defined_metrics(chosen, *whole.shape)
    if progress:
        _state_cost(whole, classes, len(names), chosen)
    found = similarity.distances(whole, without, classes, metrics=chosen, progress=progress)
    return names, {name: found[name] for name in chosen}


def _chosen(metrics: Sequence[str] | None, labels: bool) -> list[str]:
    """Return the metrics to compute, by default those of the paper that need no missing labels."""
    if metrics is None:
        return [name for name in similarity.PAPER_METRICS if labels or not similarity.METRICS[name].needs_labels]
    missing = [name for name in metrics if similarity.METRICS[name].needs_labels and not labels]
    if missing:
        raise ValueError(f"{', '.join(missing)} compare classes: give labels, or leave these metrics out")
    return list(metrics)


def _state_cost(whole: Tensor, classes: Tensor | None, blocks: int, metrics: Sequence[str]) -> None:
    """Print how long the metrics will take, if that is more than a few seconds, and which of them take longest."""
    (N, P), C = whole.shape, 1 if classes is None else len(classes.unique())
    seconds = similarity.expected_seconds(N, P, C, metrics)
    total = blocks * sum(seconds.values())
    if total > 20:
        slow = sorted(seconds, key=seconds.__getitem__, reverse=True)[:2]
        tqdm.write(f"{blocks} blocks, {len(metrics)} metrics, {N} samples of {P:,} features: very roughly "
                   f"{total / 60:.1f} min; most of it {' and '.join(slow)}, leave metrics out with metrics=[...] or "
                   f"take fewer samples", file=sys.stderr)


def _defined_metrics(metrics: list[str], samples: int, features: int) -> list[str]:
    """Return the metrics that are defined for this number of samples and features; warn of the others."""
    fine = [name for name in metrics if samples > features + 1 or not similarity.METRICS[name].needs_samples]
    if fine != metrics:
        left = ", ".join(name for name in metrics if name not in fine)
        warnings.warn(f"{left} left out: {samples} samples of {features} features; give more than {features + 1} "
                      f"samples to have all metrics", stacklevel=3)
    return fine


def ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rank of every block by every metric, 0 for the smallest change; ties share their mean rank."""
    if table.isna().to_numpy().any():
        raise ValueError("a score is missing (NaN); a block cannot be ranked without it")
    return table.rank(method="average") - 1


def rank(table: pd.DataFrame) -> list[str]:
    """Return the names of the blocks by the sum of their ranks, smallest first; ties in the order of the table."""
    return in_order(list(table.index), table.to_numpy().T)


def in_order(names: Sequence[str], by_metric: Sequence[Any] | np.ndarray) -> list[str]:
    """Return names by the sum of their ranks over the rows of ``by_metric`` (metrics, blocks), smallest first.

    Ties within a metric share their mean rank; ties of the sum stay in the order of ``names``.
    """
    changed = np.stack([np.asarray(row) for row in by_metric])
    if np.isnan(changed).any():
        raise ValueError("a score is missing (NaN); a block cannot be ranked without it")
    return [names[i] for i in rankdata(changed, axis=1).sum(0).argsort(kind="stable")]


@dataclass(frozen=True)
class Step:
    """One round of ``prune``.

    Attributes
    ----------
    removed : names of the blocks removed in this round, *as in the original network*
    order : order of the criterion before the removal, with the block names of this round
    """

    model: nn.Module
    removed: tuple[str, ...]
    order: tuple[str, ...]


def prune(model: nn.Module, criterion: Callable[[nn.Module], Sequence[str]], *, rounds: int, per_round: int = 1,
          min_blocks: int = 2) -> Iterator[Step]:
    """Yield a ``Step`` per round of ranking and removal; the caller may fine-tune ``step.model`` in between.

    ``model`` itself is not changed.

    Parameters
    ----------
    criterion : network -> names of its blocks, the first to remove first, such as
        ``lambda network: rank(scores(network, images, labels))``
    rounds, per_round : number of rounds, and number of blocks per round
    min_blocks : smallest number of blocks in every stage

    Raises
    ------
    ValueError
        before the first round, as in ``validate``.
    """
    validate(model, rounds=rounds, per_round=per_round, min_blocks=min_blocks)
    return _rounds(model, criterion, rounds, per_round, min_blocks)


def _rounds(model: nn.Module, criterion: Callable, rounds: int, per_round: int, min_blocks: int) -> Iterator[Step]:
    names = {info.name: info.name for info in families.residual_blocks(model)}  # present name -> original name
    for _ in range(rounds):
        found = step(model, criterion, per_round=per_round, min_blocks=min_blocks)
        left = [original for now, original in names.items() if now not in found.removed]
        yield Step(found.model, tuple(names[name] for name in found.removed), found.order)
        model = found.model
        names = dict(zip((info.name for info in families.residual_blocks(model)), left, strict=True))


def step(model: nn.Module, criterion: Callable[[nn.Module], Sequence[str]], *, per_round: int = 1, min_blocks: int = 2
         ) -> Step:
    """Run one round of ``prune``; ``removed`` has the present names of ``model``, in forward order."""
    order = tuple(criterion(model))
    plan = BlockPlan.of(model, select_blocks(order, model, per_round, min_blocks=min_blocks))
    removed = tuple(info.name for info in plan.blocks if info.name in plan.removed)
    return Step(surgery.remove(model, plan), removed, order)


def validate(model: nn.Module, *, rounds: int, per_round: int = 1, min_blocks: int = 2) -> None:
    """Raise ValueError unless ``rounds`` of ``per_round`` blocks can be removed from ``model``."""
    if min_blocks < 1:
        raise ValueError(f"min_blocks={min_blocks}; a stage keeps at least 1 block")
    most = max_removable(model, min_blocks)
    if not 0 < rounds * per_round <= most:
        raise ValueError(f"{rounds} rounds of {per_round} blocks; {most} blocks can be removed "
                         f"if each stage keeps {min_blocks}")


def select_blocks(order: Sequence[str], model: nn.Module, count: int, *, min_blocks: int = 2) -> list[str]:
    """Return the first ``count`` removable names of ``order``, with at least ``min_blocks`` kept in each stage."""
    infos = {info.name: info for info in families.residual_blocks(model)}
    left = Counter(info.stage for info in infos.values())
    chosen: list[str] = []
    for name in order:
        info = infos[name]
        if len(chosen) < count and info.removable and left[info.stage] > min_blocks:
            chosen.append(name)
            left[info.stage] -= 1
    if len(chosen) < count:
        raise ValueError(f"count={count}, but only {len(chosen)} blocks of this order can be removed "
                         f"if each stage keeps {min_blocks}")
    return chosen


def max_removable(model: nn.Module, min_blocks: int) -> int:
    """Return the largest number of blocks that can be removed together if each stage keeps ``min_blocks``."""
    infos = families.residual_blocks(model)
    stages: dict[int, list[bool]] = {}
    for info in infos:
        stages.setdefault(info.stage, []).append(info.removable)
    return sum(min(sum(kinds), max(0, len(kinds) - min_blocks)) for kinds in stages.values())
