"""How the next block to remove is chosen: Consensus and what it is compared with, under one roof.

A criterion is a function of the network and of labelled images (or of batches of prompts, for a language model) that
gives the network's blocks, the first to remove first.  Each is asked anew before every cut.

References
----------
.. [1] Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
   arXiv 2403.03853.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib._registry import Table
from pruning_lib.models import families
from pruning_lib.models.hooks import evaluating, inputs_to, outputs_of
from pruning_lib.pruning import consensus, similarity
from pruning_lib.pruning.consensus import Batch


@dataclass(frozen=True)
class Criterion:
    """``order(model, inputs, labels, seed)`` gives names of blocks, the first to remove first."""

    order: Callable[[nn.Module, Tensor | Iterable[Batch], Tensor | None, int], Sequence[str]]
    about: str


CRITERIA: Table = Table("criterion")


def _by(metrics: tuple[str, ...] | None
        ) -> Callable[[nn.Module, Tensor | Iterable[Batch], Tensor | None, int], Sequence[str]]:
    def order(model: nn.Module, inputs: Tensor | Iterable[Batch], labels: Tensor | None, seed: int) -> Sequence[str]:
        return consensus.rank(consensus.scores(model, inputs, labels, metrics=metrics))

    return order


def influence_order(model: nn.Module, inputs: Tensor | Iterable[Batch], labels: Tensor | None, seed: int
                    ) -> Sequence[str]:
    """What turns its input least goes first: ShortGPT's block influence [1]_."""
    names = [info.name for info in families.residual_blocks(model) if info.removable]
    found = influence(model, inputs, names)
    return [names[i] for i in found.argsort(stable=True).tolist()]


def influence(model: nn.Module, inputs: Tensor | Iterable[Batch], names: Sequence[str]) -> Tensor:
    """One minus the cosine between what enters a block and what leaves it, the mean over positions; (blocks,).

    A position is a token, padding left out, or a pixel of an image with its channels.
    """
    modules = [model.get_submodule(name) for name in names]
    total, count = torch.zeros(2, len(names), dtype=torch.float64)
    entered: dict[int, Tensor] = {}

    def compare(i: int, y: Tensor) -> None:
        x, y = (v.movedim(1, -1) if v.ndim == 4 else v for v in (entered.pop(i), y))
        turned = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)  # (B, T) or (B, height, width)
        turned = turned.flatten() if mask is None else turned[mask.to(turned.device)]
        total[i] += turned.sum().cpu()
        count[i] += len(turned)

    batches = inputs.split(128) if isinstance(inputs, Tensor) else inputs
    with (torch.inference_mode(), evaluating(model), inputs_to(modules, entered.__setitem__),
          outputs_of(modules, compare)):
        for batch in tqdm(batches, desc="block influence", leave=False):
            mask = None if isinstance(batch, Tensor) else batch["attention_mask"].bool()
            consensus.penultimate(model, batch)
    return total / count


def front_to_back(model: nn.Module, inputs: object, labels: Tensor | None, seed: int) -> Sequence[str]:
    """From front to back, without looking; the first block of every stage comes last.

    The sequence in which the published Consensus networks lost their blocks.
    """
    infos = families.residual_blocks(model)
    opens = [i == 0 or infos[i - 1].stage != info.stage for i, info in enumerate(infos)]
    in_order = sorted(range(len(infos)), key=lambda i: opens[i])
    return [infos[i].name for i in in_order if infos[i].removable]


def random_order(model: nn.Module, inputs: object, labels: Tensor | None, seed: int) -> Sequence[str]:
    """Any order, another one for every seed and every number of blocks."""
    names = [info.name for info in families.residual_blocks(model) if info.removable]
    generator = torch.Generator().manual_seed(seed * 1000 + len(names))
    return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]


def least_loss(model: nn.Module, inputs: Tensor | Iterable[Batch], labels: Tensor | None, seed: int) -> Sequence[str]:
    """The block without which the network errs least goes first: it asks the classifier instead of any metric.

    Ours, the question that a similarity metric stands in for: the cross-entropy on the calibration images, without
    tuning.
    """
    if labels is None:
        raise ValueError("the loss compares answers with classes: give labels, or take another criterion")
    names = [info.name for info in families.residual_blocks(model) if info.removable]
    _, without = consensus.representations(model, inputs, names)
    classifier = families.classifier(model)
    device = next(classifier.parameters()).device
    with torch.inference_mode():
        losses = [F.cross_entropy(classifier(features.to(device)).cpu().double(), labels) for features in without]
    return [names[i] for i in torch.stack(losses).argsort(stable=True).tolist()]


CRITERIA["consensus"] = Criterion(_by(None), "the smallest sum of ranks over all metrics goes (the paper's method)")
for _name in similarity.METRICS:
    CRITERIA[_name] = Criterion(_by((_name,)), f"what moves the representation least by {_name} alone goes")
CRITERIA["loss"] = Criterion(least_loss, "what raises the loss on calibration images least goes (a control)")

CRITERIA["block_influence"] = Criterion(influence_order, "what turns its input least goes (ShortGPT)")
CRITERIA["network_order"] = Criterion(front_to_back, "front to back, as the published networks lost theirs (a control)")
CRITERIA["random"] = Criterion(random_order, "any block goes (a control)")
