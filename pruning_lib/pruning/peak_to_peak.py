"""OptiPFair's data-driven score: range of the weights of a neuron times the norm of its activation.

References
----------
.. [1] OptiPFair 0.4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models import families
from pruning_lib.models.hooks import by_prompt, evaluating, inputs_to
from pruning_lib.pruning.selection import Importance, stacked

Batches = Iterable[Mapping[str, Tensor]]


def importance(model: nn.Module, batches: Batches, *, progress: bool = True) -> Importance:
    """Score a neuron by the range of its weights times the norm of its activation: OptiPFair's data-driven score [1]_.

    The range of a vector of weights is ``max + |min|``.  Each of a neuron's three vectors (row of the gate projection,
    row of the up projection, column of the output projection) is given as a share of the largest range in its block;
    the shares are added and multiplied by the L2 norm of the neuron over the tokens of a prompt, summed over prompts.

    Notes
    -----
    OptiPFair takes one norm over a whole batch, padding included; ours is its score with one prompt per batch.  It
    cannot remove heads.  The score of heads is our extension: the same product for every column of a head, from its
    query row and its output column, summed over the head.
    """
    norms, s = _prompt_norms(model, batches, progress), families.sizes(model)
    La = len(s.head_blocks)
    heads = [(_range_shares(model, i, "heads", D) * norm.view(-1, D)).sum(1)
             for i, D, norm in zip(s.head_blocks, s.head_widths, norms[:La], strict=True)]
    neurons = [_range_shares(model, i, "neurons", 1).flatten() * norm
               for i, norm in zip(s.neuron_blocks, norms[La:], strict=True)]
    return Importance(stacked(heads), stacked(neurons), {"method": "peak_to_peak"})


def _prompt_norms(model: nn.Module, batches: Batches, progress: bool) -> list[Tensor]:
    """Return the L2 norm over a prompt's tokens of every input of every output projection, summed over prompts."""
    modules = families.output_projections(model)
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


def _range_shares(model: nn.Module, number: int, unit: str, columns: int) -> Tensor:
    """Add up, for every column of a unit, the ranges of its weights as shares of the largest; (units, columns)."""
    block, s = families.blocks(model)[number], families.sizes(model)
    parts = families.block_parts(block, families.family_of(model).of_block(number), families.head_width(model, number))
    counts = {"heads": s.heads, "groups": s.groups, "neurons": s.neurons}
    total = torch.zeros(counts[unit], columns)
    for part, places in families.places(parts, counts):
        weight = families.tensor(block, part.parameter).detach()
        if part.unit == unit and weight.ndim == 2:
            vectors = weight.float().movedim(part.axis, 0)
            ranges = (vectors.amax(1) + vectors.amin(1).abs()).cpu()[places]
            even = ranges.shape[1] % columns == 0  # a gate has one row per head: its range counts for all columns
            for piece in ranges.view(counts[unit], -1, columns).unbind(1) if even else [ranges.mean(1, keepdim=True)]:
                total += piece / (piece.max() + 1e-8)
    return total
