"""Inputs of the output projections: their moments over tokens and their norms over prompts.

Scores that look at activations start here.  Order of this file: output_projections · moments · prompt_norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models import families
from pruning_lib.models.hooks import by_prompt, evaluating, inputs_to

Batches = Iterable[Mapping[str, Tensor]]


def output_projections(model: nn.Module) -> list[nn.Module]:
    """Return the output projections: those of the heads of every block, then those of the neurons of every block."""
    family, blocks = families.family_of(model), families.blocks(model)
    return [block.get_submodule(path) for path in (family.heads_out, family.neurons_out) if path for block in blocks]


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs of one output projection, over all tokens of all prompts."""

    tokens: int
    mean: Tensor  # (columns,) float64
    square: Tensor  # (columns,) mean of the squares


def moments(model: nn.Module, batches: Batches, *, progress: bool = True) -> list[Moments]:
    """Return the moments of the 2 L output projections, those of the heads first, then those of the neurons.

    Every token has the same weight; padding is ignored.
    """
    modules = output_projections(model)
    weights = [families.matrix(m) for m in modules]
    sums: list[Tensor] = [torch.zeros(2, w.shape[1], dtype=torch.float64, device=w.device) for w in weights]
    tokens = 0

    def see(i: int, x: Tensor) -> None:
        x = by_prompt(x, mask)[mask].double()  # (tokens, columns)
        sums[i] += torch.stack([x.sum(0), x.pow(2).sum(0)])

    with torch.inference_mode(), evaluating(model), inputs_to(modules, see):
        for batch in tqdm(batches, desc="importance", disable=not progress, leave=False):
            mask = batch["attention_mask"].bool().to(families.matrix(modules[0]).device)
            model.base_model(input_ids=batch["input_ids"].to(mask.device),  # type: ignore[operator]
                             attention_mask=mask.long(), use_cache=False)
            tokens += int(mask.sum())
    if tokens < 2:
        raise ValueError("fewer than two tokens: give at least one prompt to calibrate on")
    return [Moments(tokens, *(s / tokens)) for s in sums]


def prompt_norms(model: nn.Module, batches: Batches, progress: bool) -> list[Tensor]:
    """Return the L2 norm over a prompt's tokens of every input of every output projection, summed over prompts."""
    modules = output_projections(model)
    weights = [families.matrix(m) for m in modules]
    sums = [torch.zeros(w.shape[1], device=w.device) for w in weights]

    def see(i: int, x: Tensor) -> None:
        x = by_prompt(x, mask).float() * mask[..., None].to(x.device)  # (B, T, columns), padding zero
        sums[i] += x.pow(2).sum(1).sqrt().sum(0)

    with torch.inference_mode(), evaluating(model), inputs_to(modules, see):
        for batch in tqdm(batches, desc="importance", disable=not progress, leave=False):
            mask = batch["attention_mask"].to(weights[0].device)
            model.base_model(input_ids=batch["input_ids"].to(mask.device),  # type: ignore[operator]
                             attention_mask=mask, use_cache=False)
    return [s.cpu() for s in sums]
