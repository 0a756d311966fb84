"""Importance: AMP and the width-pruning methods it is compared with; a method is an importance and a rule.

All methods score the same units, so that all can prune to the same size.  Activations are the inputs of the output
projections, as in AMP: H*D columns for the heads and M for the neurons.
Order of this file: the table · without data · from activations · from gradients · several at once.

References
----------
.. [1] Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024, arXiv 2407.14679.
.. [2] Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023, arXiv 2306.11695.
.. [3] An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP, and Wanda-sp), 2023,
   arXiv 2312.11983.
.. [4] Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, arXiv 2305.11627.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib._registry import Table, function_of
from pruning_lib.data.batching import right_padded
from pruning_lib.models import families
from pruning_lib.models.hooks import by_prompt, evaluating, inputs_to
from pruning_lib.pruning import amp, peak_to_peak, reconstruction
from pruning_lib.pruning.selection import Importance, stacked

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A pruning method: the importance, and the rule that selects the units to remove."""

    importance: Callable[[nn.Module, Batches], Importance]
    rule: str
    about: str
    needs_text: bool = False  # needs thousands of tokens, since short prompts do not show which units are redundant


METHODS: Table = Table("method")


def uniform(model: nn.Module, batches: Batches = ()) -> Importance:
    """Return equal importances, for rules that do not use them."""
    s = families.sizes(model)
    return Importance(torch.zeros(len(s.head_blocks), s.heads), torch.zeros(len(s.neuron_blocks), s.neurons),
                      {"method": "nothing"})


def magnitude(model: nn.Module, batches: Batches = ()) -> Importance:
    """Return the L2 norm of the weights of each head (query rows and output columns) and neuron; no data is used.

    Returns
    -------
    Importance with heads (L, H) and neurons (L, M)
    """
    heads, neurons = _over_weights(model, lambda weight: weight.detach().float().pow(2))
    return Importance(heads.sqrt(), neurons.sqrt(), {"method": "magnitude"})


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs of one output projection, over all tokens of all prompts."""

    tokens: int
    mean: Tensor  # (columns,) float64
    square: Tensor  # (columns,) mean of the squares


def moments(model: nn.Module, batches: Batches, *, progress: bool = True) -> list[Moments]:
    """Return the moments of the La + Lm output projections, those of the heads first, then those of the neurons.

    Every token has the same weight; padding is ignored.
    """
    modules = families.output_projections(model)
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


def activation_norm(model: nn.Module, batches: Batches) -> Importance:
    """Return the root mean square of each neuron, and of the vector of each head before the output projection.

    The L2 norm of Minitron [1]_ for heads; weights are not used.
    """
    found = _from_moments(model, batches, lambda weight, m: m.square, "activation_norm")
    return Importance(found.heads.sqrt(), found.neurons.sqrt(), found.made_with)


def wanda(model: nn.Module, batches: Batches) -> Importance:
    """Return the score of Wanda-sp.

    ``|weight| x norm of its input`` [2]_, averaged over a column and summed over the columns of a unit [3]_.
    """
    return _from_moments(model, batches, lambda weight, m: weight.abs().mean(0) * m.square.sqrt(), "wanda")


def flap(model: nn.Module, batches: Batches) -> Importance:
    """Return FLAP's score: variance of an input over tokens x squared norm of its column [3]_ (the metric WIFV).

    An input that does not fluctuate can be replaced by its mean.  Only the score is used here: FLAP also compares it
    across blocks and adds the mean to biases, and plain transformers loads neither.  The score of a head is the sum of
    the squared scores of its columns, as in the published code.
    """
    def score(weight: Tensor, m: Moments) -> Tensor:
        return (m.square - m.mean**2).clamp(min=0) * m.tokens / (m.tokens - 1) * weight.pow(2).sum(0)

    return _from_moments(model, batches, score, "flap", power=2)


def taylor(model: nn.Module, batches: Batches, *, progress: bool = True) -> Importance:
    """Return the first-order Taylor score: sum of ``|weight x gradient|`` over the weights of a head or neuron [4]_.

    The element-wise score of LLM-Pruner.  The loss is next-token cross-entropy, with the same weight for every prompt.
    The weights are those of ``magnitude``: query rows and output columns of a head (LLM-Pruner adds keys and values,
    which are removed here only with a whole group of heads).
    The score needs a backward pass, and memory for the gradients of all blocks.

    Raises
    ------
    ValueError
        when no prompt has two tokens, or gradients are not finite.
    """
    with evaluating(model), _gradients(model):
        prompts = sum(_backward(model, batch)
                      for batch in tqdm(batches, desc="importance", disable=not progress, leave=False))
        if not prompts:
            raise ValueError("no prompt has a next token to predict; give at least one prompt of two tokens")
        heads, neurons = _over_weights(model, _first_order)
    if not (torch.isfinite(heads).all() and torch.isfinite(neurons).all()):
        raise ValueError("gradients are not finite; load the model in float32 or bfloat16, not float16")
    return Importance(heads / prompts, neurons / prompts, {"method": "taylor", "prompts": prompts})


METHODS["amp"] = Method(amp.importance, "lowest", "removes the smallest projected activation (the paper's method)")
METHODS["highest"] = Method(amp.importance, "highest", "AMP reversed: removes the most important units (a control)")
METHODS["random"] = Method(uniform, "random", "removes random heads and neurons (a control)")
METHODS["magnitude"] = Method(magnitude, "lowest", "removes the smallest weights, without data")
METHODS["activation_norm"] = Method(activation_norm, "lowest", "removes the smallest activations, without weights")
METHODS["wanda"] = Method(wanda, "lowest", "removes the smallest weight x activation (Wanda-sp)")
METHODS["flap"] = Method(flap, "lowest", "removes the smallest variation over tokens (FLAP, without its biases)")
METHODS["peak_to_peak"] = Method(
    peak_to_peak.importance, "lowest", "removes the smallest weight range x activation (OptiPFair)")
METHODS["taylor"] = Method(taylor, "lowest", "removes the smallest first-order change of the loss (LLM-Pruner)")
METHODS["reconstruction_error"] = Method(
    reconstruction.reconstruction_error, "lowest",
    "removes the smallest error left after least squares (ours; OBS, ZipLM)", needs_text=True)


def method_of(method: str | Callable[..., Any]) -> Method:
    """Return a method of the table, or one made of a function of your own, of which the lowest scores go.

    Parameters
    ----------
    method : key of ``METHODS``; a function of the model and the batches; or ``"module:function"``, which names one.
        The function returns an ``Importance``, or scores of heads (L, H) and neurons (L, M)

    Raises
    ------
    ValueError
        for an unknown name, and for a function that cannot be loaded.
    """
    if isinstance(method, str) and ":" not in method:
        return METHODS[method]
    function = function_of(method) if isinstance(method, str) else method
    name = getattr(function, "__name__", type(function).__name__)

    def scores(model: nn.Module, batches: Batches) -> Importance:
        found = function(model, batches)
        if isinstance(found, Importance):
            return found
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
            raise ValueError(f"{name} returned a {type(found).__name__}; wanted an Importance, or two tensors: scores "
                             f"of heads (L, H) and of neurons (L, M)")
        heads, neurons = (part.detach().float().cpu() for part in found)
        return Importance(heads, neurons, {"method": name})

    return Method(scores, "lowest", f"{name}: removes the lowest scores")


def importance(model: nn.Module, batches: Batches, *, method: str | Callable[..., Any] = "amp") -> Importance:
    """Return the importance of every head and neuron of a language model.

    Parameters
    ----------
    batches : calibration data, dicts of ``input_ids`` and ``attention_mask``, each (B, T), padded on one side
    method : key of ``METHODS``, or a function of your own, as in ``method_of``

    Returns
    -------
    Importance with heads (L, H) and neurons (L, M); larger means keep

    Raises
    ------
    ValueError
        for unknown names, and for batches of another form.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> prompts = pl.batches(["The sea is", "Once upon a time"], tokenizer)
    >>> scores = pl.importance(model, prompts)
    >>> scores.heads.shape, scores.neurons.shape
    (torch.Size([3, 6]), torch.Size([3, 64]))
    """
    return method_of(method).importance(model, right_padded(batches))


def importances(methods: Iterable[str], model: nn.Module, batches: Batches) -> dict[str, Importance]:
    """Return the importances of several methods; an importance shared by two methods is measured once."""
    functions = {name: METHODS[name].importance for name in methods}  # refuses unknown names
    batches, measured = right_padded(batches), {}
    for function in functions.values():
        if function not in measured:
            measured[function] = function(model, batches)
    return {name: measured[function] for name, function in functions.items()}


def _from_moments(model: nn.Module, batches: Batches, score: Callable[[Tensor, Moments], Tensor], name: str,
                  power: int = 1) -> Importance:
    """Return the importance from ``score(weight (C, columns), moments) -> (columns,)``.

    The score of a head is the sum, over its columns, of the scores to ``power``.
    """
    found = moments(model, batches)
    columns = [score(families.matrix(layer).detach().double(), m)
               for layer, m in zip(families.output_projections(model), found, strict=True)]
    s = families.sizes(model)
    La = len(s.head_blocks)
    heads = [c.pow(power).view(-1, D).sum(1) for c, D in zip(columns[:La], s.head_widths, strict=True)]
    return Importance(stacked(heads), stacked(columns[La:]), {"method": name, "tokens": found[0].tokens})


def _over_weights(model: nn.Module, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sums of ``value(weight)``, one number per weight, over each head (La, H) and neuron (Lm, M)."""
    family, s = families.family_of(model), families.sizes(model)
    counts = {"heads": s.heads, "groups": s.groups, "neurons": s.neurons}
    rows: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
    for i, block in enumerate(families.blocks(model)):
        own = family.of_block(i)
        found = {unit: torch.zeros(counts[unit]) for unit in rows if families.has(block, own, unit)}
        for part, places in families.places(families.block_parts(block, own, families.head_width(model, i)), counts):
            weight = families.tensor(block, part.parameter)
            if part.unit in found and weight.ndim == 2:
                found[part.unit] += value(weight).sum(1 - part.axis).cpu()[places].sum(1)
        for unit, scores in found.items():
            rows[unit].append(scores)
    return stacked(rows["heads"]), stacked(rows["neurons"])


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Enable gradients for the decoder blocks only, initially None; restore all settings afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    in_blocks = {id(p) for p in families.blocks(model).parameters()}
    for p, _, _ in before:
        p.requires_grad_(id(p) in in_blocks)
        p.grad = None
    try:
        yield
    finally:
        for p, learns, gradient in before:
            p.requires_grad_(learns)
            p.grad = gradient


def _first_order(weight: Tensor) -> Tensor:
    """Return the first-order change of the loss when one weight is set to zero, in the shape of the weight."""
    return (weight.detach() * cast(Tensor, weight.grad)).float().abs()


def _backward(model: Any, batch: Mapping[str, Tensor]) -> int:
    """Add the gradients of the mean loss of each prompt; return the number of prompts with a next token."""
    prompts = 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()][None].to(model.device)
        if ids.shape[1] > 1:
            with torch.enable_grad():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            prompts += 1
    return prompts
