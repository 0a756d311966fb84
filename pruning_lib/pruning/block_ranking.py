"""Block ranking: Consensus and the criteria it is compared with.

A criterion is a function of a network and of labelled images (batches of prompts for a language model).  It returns the
names of the blocks, the first to remove first.  It is computed again before every removal.

References
----------
.. [1] Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
   arXiv 2403.03853.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib._registry import Table, function_of
from pruning_lib.data.labelled_images import have_labels, labelled_batches, refuse_logits
from pruning_lib.models import families
from pruning_lib.models.hooks import evaluating, inputs_to, outputs_of
from pruning_lib.pruning import consensus, similarity


@dataclass(frozen=True)
class Criterion:
    """A criterion: ``order(model, inputs, labels, seed)`` returns names of blocks, the first to remove first."""

    order: Callable[[nn.Module, Any, Any, int], Sequence[str]]
    about: str
    needs_labels: bool = False  # so that it cannot choose blocks of a language model
    needs_samples: bool = False  # more of them than features


CRITERIA: Table = Table("criterion")


def rank_blocks(model: nn.Module, inputs: Any, labels: Any = None, *,
                criterion: str = "consensus", seed: int = 0) -> list[str]:
    """Return the names of the removable blocks, the first to remove first.

    Parameters
    ----------
    inputs : (N, channels, height, width) pixels in [0, 1]; a data set such as ImageFolder, a DataLoader, or batches;
        for a language model batches are dicts of ``input_ids`` and ``attention_mask``, each (B, T), padded on the right
    labels : (N,) class of each image, for criteria that compare classes; None where the inputs hold them
    criterion : key of ``CRITERIA``
    seed : of the criterion ``random``

    Examples
    --------
    >>> import torch
    >>> import pruning_lib as pl
    >>> network, _ = pl.load_model("./toy-resnet")
    >>> images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 2
    >>> order = pl.rank_blocks(network, images, labels)
    >>> sorted(order)
    ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1']
    """
    return list(CRITERIA[criterion].order(model, inputs, labels, seed))


def prune_blocks(model: nn.Module, inputs: Any, labels: Any = None, *,
                 blocks_removed: int, criterion: str = "consensus", min_blocks: int = 1, seed: int = 0,
                 tune: Callable[[nn.Module], object] | None = None) -> consensus.Step:
    """Remove blocks one at a time, ranked anew after every removal; ``model`` itself is not changed.

    Parameters
    ----------
    inputs, labels, criterion, seed : as in ``rank_blocks``
    blocks_removed : number of blocks
    min_blocks : smallest number of blocks in every stage
    tune : called with the smaller network after every removal, to fine-tune it in place

    Returns
    -------
    Step with the smaller ``model``, the names of the ``removed`` blocks in the original network, and the last ``order``

    Raises
    ------
    ValueError
        before work starts, for more blocks than the stages have to give.

    Examples
    --------
    >>> import torch
    >>> import pruning_lib as pl
    >>> network, _ = pl.load_model("./toy-resnet")
    >>> images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 2
    >>> step = pl.prune_blocks(network, images, labels, blocks_removed=1)
    >>> len(step.removed)
    1
    """
    def ranking(network: nn.Module) -> Sequence[str]:
        return rank_blocks(network, inputs, labels, criterion=criterion, seed=seed)

    removed: tuple[str, ...] = ()
    for step in consensus.prune(model, ranking, rounds=blocks_removed, min_blocks=min_blocks):
        removed += step.removed
        if tune is not None:
            tune(step.model)
    return consensus.Step(step.model, removed, step.order)


def _by(metrics: tuple[str, ...] | None
        ) -> Callable[[nn.Module, Any, Any, int], Sequence[str]]:
    def order(model: nn.Module, inputs: Any, labels: Any, seed: int) -> Sequence[str]:
        names, changes = consensus.changes(model, inputs, labels, metrics=metrics)
        return consensus.in_order(names, list(changes.values()))

    return order


def influence_order(model: nn.Module, inputs: Any, labels: Any, seed: int
                    ) -> Sequence[str]:
    """Rank blocks by ShortGPT's block influence [1]_: the smallest change of direction first."""
    names = [info.name for info in families.residual_blocks(model) if info.removable]
    found = influence(model, inputs, names)
    return [names[i] for i in found.argsort(stable=True).tolist()]


def influence(model: nn.Module, inputs: Any, names: Sequence[str]) -> Tensor:
    """Return one minus the cosine between input and output of each block, averaged over positions; (blocks,).

    A position is a token (without padding), or a pixel of a feature map with its channels.
    """
    units = [families.unit(model, name) for name in names]
    branch = next((name for name, unit in zip(names, units, strict=True) if unit.silenced), None)
    if branch:
        raise ValueError(f"{branch} is a branch inside a block, whose input and output block influence does not see; "
                         f"take another criterion, or describe the network without branches")
    modules = [model.get_submodule(unit.block) for unit in units]
    total, count = torch.zeros(2, len(names), dtype=torch.float64)
    entered: dict[int, Tensor] = {}

    def compare(i: int, y: Tensor) -> None:
        x, y = (v.movedim(1, -1) if v.ndim == 4 and not _channels_last(modules[i], v) else v
                for v in (entered.pop(i), y))
        turned = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)  # (B, T) or (B, height, width)
        turned = turned.flatten() if mask is None else turned[mask.to(turned.device)]
        total[i] += turned.sum().cpu()
        count[i] += len(turned)

    batches = labelled_batches(inputs)
    with (torch.inference_mode(), evaluating(model),  # copied: a block of any network may work in place on its input
          inputs_to(modules, lambda i, x: entered.__setitem__(i, x.clone())), outputs_of(modules, compare)):
        for batch, _ in tqdm(batches, desc="block influence", leave=False):
            mask = None if isinstance(batch, Tensor) else batch["attention_mask"].bool()
            consensus.penultimate(model, batch)
    return total / count


def _channels_last(block: nn.Module, x: Tensor) -> bool:
    """Return True if the first weights of a block act on the last dimension of x, as in Swin."""
    first = next((m for m in block.modules() if next(m.parameters(recurse=False), None) is not None), None)
    width = {nn.Linear: "in_features", nn.LayerNorm: "normalized_shape"}.get(type(first))  # type: ignore[arg-type]
    found = getattr(first, width) if width else None
    return (found[-1] if isinstance(found, tuple) else found) == x.shape[-1]


def front_to_back(model: nn.Module, inputs: object, labels: Any, seed: int) -> Sequence[str]:
    """Rank blocks from front to back, without data; the first block of every stage comes last.

    Blocks were removed in this order from the published Consensus networks.
    """
    infos = families.residual_blocks(model)
    opens = [i == 0 or infos[i - 1].stage != info.stage for i, info in enumerate(infos)]
    in_order = sorted(range(len(infos)), key=lambda i: opens[i])
    return [infos[i].name for i in in_order if infos[i].removable]


def random_order(model: nn.Module, inputs: object, labels: Any, seed: int) -> Sequence[str]:
    """Rank blocks in random order, drawn anew for every seed and every number of blocks."""
    names = [info.name for info in families.residual_blocks(model) if info.removable]
    generator = torch.Generator().manual_seed(seed * 1000 + len(names))
    return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]


def least_loss(model: nn.Module, inputs: Any, labels: Any, seed: int) -> Sequence[str]:
    """Rank blocks by the loss of the network without them, the smallest first.

    Our own control for similarity metrics: the cross-entropy on the calibration images, without fine-tuning.
    """
    if have_labels(inputs, labels) is False:
        raise ValueError("the criterion 'loss' needs labels: give the class of each image, or take another criterion")
    names = [info.name for info in families.residual_blocks(model) if info.removable]
    _, without, classes = consensus.labelled_representations(model, inputs, labels, names)
    if classes is None:
        raise ValueError("the criterion 'loss' needs labels: give the class of each image, or take another criterion")
    with torch.inference_mode():
        losses = [_loss(families.classifier(model), features, classes) for features in without]
    return [names[i] for i in torch.stack(losses).argsort(stable=True).tolist()]


def _loss(classifier: nn.Module, features: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy of features (N, P)."""
    features = features.to(next(classifier.parameters()).device)
    if isinstance(classifier, nn.Conv2d):
        features = features[:, :, None, None]
    logits = classifier(features).flatten(1).cpu().double()
    refuse_logits(logits, classes)
    return F.cross_entropy(logits, classes)


CRITERIA["consensus"] = Criterion(_by(None), "removes the smallest sum of ranks over all metrics (the paper's method)")
for _name in similarity.METRICS:
    _metric = similarity.METRICS[_name]
    CRITERIA[_name] = Criterion(_by((_name,)), f"removes the smallest change by one measure: {_metric.about}",
                                needs_labels=_metric.needs_labels, needs_samples=_metric.needs_samples)
CRITERIA["loss"] = Criterion(least_loss, "removes the smallest increase of the loss on calibration images (a control)",
                             needs_labels=True)
CRITERIA["block_influence"] = Criterion(influence_order, "removes the smallest change of direction (ShortGPT)")
CRITERIA["front_to_back"] = Criterion(front_to_back, "removes from front to back, as was published (a control)")
CRITERIA["random"] = Criterion(random_order, "removes a random block (a control)")


def criterion_of(criterion: str | Callable[..., Sequence[str]]) -> Criterion:
    """Return a criterion of the table for language models, or one made of a function of your own.

    Parameters
    ----------
    criterion : key of ``CRITERIA``; a function of the model and the batches that returns the names of its blocks, the
        first to remove first; or ``"module:function"``, which names one

    Raises
    ------
    ValueError
        for an unknown name, one that needs labels, and a function that cannot be loaded.
    """
    if isinstance(criterion, str) and ":" not in criterion:
        usable = Table("criterion of language models")
        usable.update((name, other) for name, other in CRITERIA.items() if not other.needs_labels)
        if criterion in CRITERIA and criterion not in usable:
            raise ValueError(f"criterion={criterion!r} needs labelled images, a language model has none; take one of: "
                             f"{', '.join(usable)}")
        return usable[criterion]
    function = function_of(criterion) if isinstance(criterion, str) else criterion
    name = getattr(function, "__name__", type(function).__name__)

    def order(model: nn.Module, inputs: Any, labels: Any, seed: int) -> Sequence[str]:
        found, known = list(function(model, inputs)), {i.name for i in families.residual_blocks(model) if i.removable}
        if not set(found) <= known:
            raise ValueError(f"{name} returned {found[:3]}; wanted names of blocks: "
                             f"{', '.join(sorted(known)[:3])}, ...")
        return found

    return Criterion(order, f"{name}: removes the blocks it names first")
