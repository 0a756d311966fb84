"""AMP: importance of attention heads and MLP neurons.

Idea: the importance of a head is the size of its contribution to the residual stream, the importance of a neuron the
size of its activation, averaged over the tokens of a prompt and then over prompts [1]_.  One pass gives both.
Order of this file: importance · head_scores · neuron_scores.  ``choose`` is in ``selection``, cutting in
``surgery``.

References
----------
.. [1] Mugnaini et al., "Efficient LLMs with AMP: Attention Heads and MLP Pruning", 2025, arXiv 2504.21174.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models import families, offload
from pruning_lib.models.hooks import by_prompt, evaluating, inputs_to
from pruning_lib.pruning.selection import Importance


@dataclass(frozen=True)
class ScoreSums:
    """Scores summed over prompts, not yet divided by their number; the sums of several parts can be merged.

    Attributes
    ----------
    heads : (La, H) float64
    neurons : (Lm, M) float64
    prompts : number of prompts
    dtype : dtype of the model
    """

    heads: Tensor
    neurons: Tensor
    prompts: int
    dtype: str


def importance(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> Importance:
    """Score every head and every neuron of a language model in one pass.

    Every prompt has the same weight, whatever its length.  Padding is ignored.  The language-model head is not run.

    Parameters
    ----------
    model : causal language model of a family in ``families.FAMILIES``
    batches : dicts with ``input_ids`` and ``attention_mask``, each (B, T), padded on the right

    Returns
    -------
    Importance with heads (La, H) and neurons (Lm, M), float32 whatever the model's dtype; La and Lm are the numbers of
    blocks with heads and with neurons, L in most families

    Raises
    ------
    ValueError
        without prompts, for padding on the left, or when the model's activations are not finite.

    Notes
    -----
    Departs from the published code, which runs one prompt at a time and heads and neurons in two passes: the scores are
    the same up to rounding, and a test compares the two.
    """
    return merge([score_sums(model, batches, progress=progress)])


def merge(parts: Iterable[ScoreSums]) -> Importance:
    """Return the importance over all prompts from the sums of several parts, in any order.

    Float32 scores are summed in float64.  The sums are exact as long as the largest score of a batch is less than
    2^29 / batches times the smallest one; merged parts then equal a single pass bit for bit.

    Raises
    ------
    ValueError
        without prompts, for parts of different models, or when the model's activations are not finite.
    """
    parts = list(parts)
    if not sum(part.prompts for part in parts):
        raise ValueError("no batches: give at least one prompt to calibrate on")
    if len({(part.heads.shape, part.neurons.shape, part.dtype) for part in parts}) > 1:
        raise ValueError("the parts come from models of different sizes or dtypes; compute all with the same model")
    prompts = sum(part.prompts for part in parts)
    heads = torch.stack([part.heads for part in parts]).sum(0) / prompts
    neurons = torch.stack([part.neurons for part in parts]).sum(0) / prompts
    if not (torch.isfinite(heads).all() and torch.isfinite(neurons).all()):
        raise ValueError("activations are not finite; load the model in float32 or bfloat16, not float16")
    return Importance(heads.float(), neurons.float(), {"method": "amp", "prompts": prompts, "dtype": parts[0].dtype})


def score_sums(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> ScoreSums:
    """Return the scores summed over the prompts of ``batches``, on the CPU: ``importance`` before the division.

    Several workers can each process a part of the batches; ``merge`` combines their sums.  Batches are read one at a
    time, so a generator is enough.  The model may be on several devices, or offloaded to disk.
    """
    s, family = families.sizes(model), families.family_of(model)
    device, factor = offload.input_device(model), families.stream_factor(model)
    La, blocks = len(s.head_blocks), families.blocks(model)
    heads = torch.zeros(La, s.heads, dtype=torch.float64)
    neurons = torch.zeros(len(s.neuron_blocks), s.neurons, dtype=torch.float64)
    outputs = families.output_projections(model)
    heads_out, neurons_out = outputs[:La], outputs[La:]
    norms = [blocks[i].get_submodule(family.heads_norm) for i in s.head_blocks] if family.heads_norm else []
    decoder: Any = model.base_model  # the model without the language-model head
    weights: Tensor  # (B, T): 1 / length of the prompt, 0 for padding

    def see(i: int, x: Tensor) -> None:
        here = weights.to(x.device)
        x = by_prompt(x, here)
        if i < len(heads_out):
            with offload.materialized(heads_out[i]):
                w_out = families.matrix(heads_out[i])
                if norms:
                    with offload.materialized(norms[i]):
                        w_out, here = _through_norm(x, heads_out[i], norms[i], here)
                heads[i] += factor * head_scores(x, w_out, here, D=s.head_widths[i]).cpu()
        else:
            neurons[i - len(heads_out)] += neuron_scores(x, here).cpu()

    prompts = 0
    with torch.inference_mode(), evaluating(model), inputs_to([*heads_out, *neurons_out], see):
        for batch in tqdm(batches, desc="importance", disable=not progress, leave=False):
            mask = _right_padded(batch["attention_mask"]).to(device)
            weights = mask / mask.sum(1, keepdim=True)
            decoder(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
            prompts += len(mask)
    return ScoreSums(heads, neurons, prompts, str(next(model.parameters()).dtype))


def head_scores(x: Tensor, w_out: Tensor, weights: Tensor, *, D: int) -> Tensor:
    """Return the contribution of each head to the residual stream: sum over tokens of weight x L1 norm.

    Parameters
    ----------
    x : (B, T, H*D) input of the output projection, the heads side by side
    w_out : (C, H*D) weight of the output projection
    weights : (B, T) weight of each token; 0 excludes it

    Returns
    -------
    (H,) in units of the residual stream
    """
    kept = weights > 0  # padding is dropped before the multiplications
    x, weights = x[kept], weights[kept]  # (N, H*D), (N,)
    scores = []
    for x_h, w_h in zip(x.split(D, 1), w_out.split(D, 1), strict=True):
        added = x_h @ w_h.T  # (N, C), one head at a time to save memory
        scores.append(weights @ added.abs_().sum(1, dtype=torch.float32))
    return torch.stack(scores)


def _through_norm(x: Tensor, layer: nn.Module, norm: nn.Module, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output projection and the weights of the tokens as they are behind a norm.

    Some families norm the output of attention before it is added to the residual stream.  An RMS norm multiplies a
    token by one number, which all heads make together, and a channel by its gain.  That number is held: a head's own
    contribution is then linear in the head, and the contributions of all heads add up to the sum added to the stream.
    """
    w_out, bias = families.matrix(layer), getattr(layer, "bias", None)
    gain = norm(torch.ones(len(w_out), dtype=w_out.dtype, device=w_out.device))  # (C,): 1 has a root mean square of 1
    added = torch.nn.functional.linear(x, w_out, bias)  # (B, T, C)
    scale = norm(added).float().norm(dim=-1) / (added * gain).float().norm(dim=-1).clamp(min=1e-30)  # (B, T)
    return w_out * gain[:, None], weights * scale


def neuron_scores(x: Tensor, weights: Tensor) -> Tensor:
    """Return the size of the activation of each neuron: sum over tokens of weight x absolute value.

    Parameters
    ----------
    x : (B, T, M) input of the output projection of the MLP
    weights : (B, T) weight of each token; 0 excludes it

    Returns
    -------
    (M,)
    """
    return weights.flatten() @ x.flatten(0, 1).abs().float()


def _right_padded(mask: Tensor) -> Tensor:
    mask = mask.long()  # a difference of booleans has no sign
    if (mask[:, 0] == 0).any() or (mask.diff(dim=1) > 0).any():
        raise ValueError("attention_mask must be 1 for the tokens of a prompt, then 0: pad on the right, "
                         "and leave empty prompts out")
    return mask
