"""Closed-form reconstruction: kept weights are re-solved by least squares to approximate the unpruned output.

Our combination, for the plan of any width method.  Heads and neurons act on the residual stream through the two output
projections of a block, which are linear.  After a cut, the kept columns get the weights with the smallest change of the
projection's output on calibration text: ridge least squares on the Gram matrix of its inputs.  No gradient training is
needed, and the architecture of the checkpoint is unchanged.

The ideas are from the literature.  The error of a removed unit *after* the other weights are re-solved is the score of
the optimal brain surgeon [1]_, and of ZipLM [2]_ for whole units.  Channel pruning [3]_ re-solves the kept channels by
least squares.  FLAP [4]_ adds the mean of removed inputs to biases; least squares includes this for layers with a bias.
Asymmetric reconstruction [5]_ takes the output of the *dense* model as its target, so that a layer also corrects the
errors of earlier layers; GPTAQ [6]_ applied it to quantised language models.
Order of this file: reconstruct · reconstruction_error · Gram matrices · output projections · passes over the model ·
reconstruction of one projection.

References
----------
.. [1] Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", 1992.
.. [2] Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, arXiv 2302.04089.
.. [3] He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, arXiv 1707.06168.
.. [4] An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, arXiv 2312.11983.
.. [5] Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015,
   arXiv 1505.06798.
.. [6] Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, arXiv 2504.02692.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models import families, surgery
from pruning_lib.models.hooks import by_prompt, evaluating, inputs_to, only_block, outputs_of
from pruning_lib.models.plan import Plan
from pruning_lib.pruning import least_squares
from pruning_lib.pruning.least_squares import Gram, GramAccumulator
from pruning_lib.pruning.selection import Importance

Batch = Mapping[str, Tensor]
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MODES = ("one_pass", "sequential", "asymmetric")


@dataclass(frozen=True)
class Reconstruction:
    """Result of least squares for one output projection.

    Attributes
    ----------
    ridge : relative to the mean of the Gram matrix's diagonal
    cut_error, error : relative squared error of the projection's output on the calibration tokens, after the columns
        are removed, and after the kept columns are re-solved
    """

    layer: str
    ridge: float
    cut_error: float
    error: float


def reconstruct(model: nn.Module, plan: Plan, batches: Iterable[Batch], *, ridge: float | Sequence[float] = RIDGES,
                mode: str = "sequential", progress: bool = True) -> tuple[nn.Module, list[Reconstruction]]:
    """Remove the heads and neurons of ``plan``, and re-solve the output projections on the given text.

    Parameters
    ----------
    batches : calibration text, dicts of ``input_ids`` and ``attention_mask``, each (B, T); every token has the same
        weight
    ridge : penalty on the change of the weights, relative to the mean diagonal of the Gram matrix; of several values,
        each projection takes the one with the least error on every fifth batch, which is held out for this choice.
        The amount of text matters most: with a few thousand tokens a small ridge fits noise, and the error on other
        text can exceed that of the plain cut
    mode : ``"one_pass"`` collects all Gram matrices in one pass over the dense model.  ``"sequential"`` re-solves block
        after block, each on the outputs of the *pruned* blocks before it (2 to 3 passes, one Gram matrix in memory at a
        time).  ``"asymmetric"`` is sequential with the residual stream of the dense model as the target, so that each
        projection also corrects the errors of the blocks before it (about 1.5 times as long, and twice the residual
        stream of the calibration text in memory)

    Returns
    -------
    the pruned model (a copy; ``model`` is unchanged), and the result for every projection with removed columns

    Raises
    ------
    ValueError
        when the plan was made for another model, for missing or too little text, for activations that are not finite,
        and for ``"asymmetric"`` in a family that normalises its output projections before the residual stream.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> prompts = pl.batches(["The sea is", "Once upon a time"], tokenizer)
    >>> plan = pl.choose(pl.importance(model, prompts), model, removed_fraction=0.2)
    >>> text = pl.batches(pl.texts("mini_text", 8, split="test"), tokenizer, tokens_per_batch=256)
    >>> smaller, layers = pl.reconstruct(model, plan, text, progress=False)
    >>> len(layers)  # one output projection of an MLP in each block
    3
    """
    if families.sizes(model) != plan.sizes:
        raise ValueError("the plan was made for a model of other sizes (or this model is pruned already); "
                         "choose a new plan for this model")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; allowed: {', '.join(MODES)}")
    several = isinstance(ridge, Sequence)
    ridges = tuple(ridge) if isinstance(ridge, Sequence) else (float(ridge),)
    if not ridges or min(ridges) < 0:
        raise ValueError(f"ridge={ridge}; give one or more numbers, 0 or larger")
    batches = list(batches)
    refuse_little_text(batches, ridge)
    fit, held_out = _split(batches, several)
    work = families.copy_of(model)
    lost = {c.name: columns for c in _output_projections(work) if len(columns := _columns(plan, c))}
    closings = [c for c in _output_projections(work) if c.name in lost]
    reconstructions = []
    with torch.no_grad(), evaluating(work), evaluating(model):
        walk = (_all_at_once(work, closings, fit, held_out, progress) if mode == "one_pass" else
                _one_by_one(work, model if mode == "asymmetric" else None, closings, fit, held_out, progress))
        for closing, gram, held in walk:
            reconstructions.append(_reconstruction(closing, lost[closing.name], gram, held, ridges))
    return surgery.remove(work, plan, inplace=True), reconstructions


def reconstruction_error(model: nn.Module, batches: Iterable[Batch], *, ridge: float = 0.1, progress: bool = True
               ) -> Importance:
    """Return the error left by least squares after a head or neuron is removed; larger means keep.

    The score of a head is the error of its projection, per token, after the other columns are re-solved:
    ``trace(W_h inverse(G)_hh^-1 W_h^T) / tokens``.  Neurons are removed one after the other, the cheapest first, and
    the rest is re-solved in between, so that one of two redundant neurons is kept; the score of a neuron is the
    cumulative error at its removal.

    Parameters
    ----------
    batches : as in ``reconstruct``
    ridge : as in ``reconstruct``

    Returns
    -------
    Importance with heads (L, H) and neurons (L, M), squared error of a projection's output, per token
    """
    scores: dict[bool, list[Tensor]] = {True: [], False: []}
    with torch.no_grad(), evaluating(model):
        for closing, gram, _ in _all_at_once(model, _output_projections(model), list(batches), [], progress):
            gram = gram.double()
            G = least_squares.damped(gram.square if closing.layer.bias is None else gram.centred(), ridge)
            weight = families.matrix(closing.layer).double()
            found = (least_squares.cost_alone(G, weight, closing.width) if closing.heads
                     else least_squares.cost_in_turn(G, weight))
            scores[closing.heads].append(found / gram.tokens)
    L = families.sizes(model).blocks
    heads, neurons = (torch.stack(scores[kind]).float().cpu() if scores[kind] else torch.zeros(L, 0)
                      for kind in (True, False))
    return Importance(heads, neurons,
                      {"method": "reconstruction_error", "ridge": ridge, "tokens": gram.tokens})


def grams(model: nn.Module, layers: Sequence[nn.Linear], batches: Sequence[Batch], *, progress: bool = True
          ) -> list[Gram]:
    """Return the Gram matrices of the inputs of linear ``layers`` of ``model``, from one pass without padding."""
    sums = [GramAccumulator(layer) for layer in layers]

    def see(i: int, x: Tensor) -> None:
        sums[i].add(by_prompt(x, mask)[mask.to(x.device)])

    with torch.no_grad(), evaluating(model), inputs_to(layers, see):
        for batch in tqdm(batches, desc="Gram matrices", disable=not progress, leave=False):
            mask = batch["attention_mask"].bool()
            _forward(model, batch)
    return [s.gram() for s in sums]


@dataclass(frozen=True)
class _OutputProjection:
    """One output projection, with ``width`` columns per unit."""

    name: str
    block: str
    layer: nn.Linear
    heads: bool
    width: int


def _output_projections(model: nn.Module) -> list[_OutputProjection]:
    """Return the output projections in forward order: of each block, that of the heads, then that of the neurons."""
    family, D = families.family_of(model), families.head_width(model)
    names = [info.name for info in families.residual_blocks(model)]
    paths = [(path, heads) for path, heads in ((family.heads_out, True), (family.neurons_out, False)) if path]
    return [_OutputProjection(f"{name}.{path}", name, families.linear(model.get_submodule(name), path), heads,
                              D if heads else 1)
            for name in names for path, heads in paths]


def _columns(plan: Plan, closing: _OutputProjection) -> Tensor:
    """Return the removed columns of an output projection."""
    units = (plan.removed_heads if closing.heads else plan.neurons)[int(closing.block.rpartition(".")[2])]
    return (units[:, None] * closing.width + torch.arange(closing.width)).flatten()


def refuse_little_text(batches: Sequence[Batch], ridge: float | Sequence[float] = RIDGES) -> None:
    """Raise ValueError for too little text: one text, or two where one is held out to choose among several ridges."""
    apart = isinstance(ridge, Sequence)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    if texts < 1 + apart:
        raise ValueError(f"{texts} texts for the reconstruction; give at least {1 + apart}"
                         + ", so that one can be held out to choose the ridge" * apart
                         + ", or reconstruction='none'")


def _split(batches: list[Batch], apart: bool) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those to fit and, if ``apart``, every fifth one to choose the ridge."""
    if apart and len(batches) == 1:  # texts take the place of batches
        rows = range(len(batches[0]["input_ids"]))
        batches = [{name: part[i:i + 1] for name, part in batches[0].items()} for i in rows]
    held = batches[1::5] if apart else []
    return [b for i, b in enumerate(batches) if not apart or i % 5 != 1], held


def _all_at_once(model: nn.Module, closings: list[_OutputProjection], fit: list[Batch], held_out: list[Batch],
                 progress: bool) -> Iterator[tuple[_OutputProjection, Gram, Gram]]:
    """Yield Gram matrices of the unchanged model, all collected in one pass before the first is used."""
    layers = [c.layer for c in closings]
    yield from zip(closings, *(grams(model, layers, part, progress=progress) for part in (fit, held_out)), strict=True)


def _one_by_one(work: nn.Module, dense: nn.Module | None, closings: list[_OutputProjection], fit: list[Batch],
                held_out: list[Batch], progress: bool) -> Iterator[tuple[_OutputProjection, Gram, Gram]]:
    """Yield Gram matrices on the present outputs of the blocks in front; with ``dense``, the residuals too."""
    now, wanted = _ResidualStream(work), None if dense is None else _ResidualStream(dense)
    names = [info.name for info in families.residual_blocks(work)]
    if wanted:
        wanted.refuse_unless_added(names[0], (fit + held_out)[0])
    for name in tqdm(names, desc="reconstruct", disable=not progress, leave=False):
        targets = {id(batch): wanted.points(name, batch) for batch in fit + held_out} if wanted else {}
        for closing in (c for c in closings if c.block == name):
            yield closing, *(_gram(now, closing, part, targets) for part in (fit, held_out))  # type: ignore[misc]
        for batch in fit + held_out if name != names[-1] else ():
            now.kept[id(batch)] = now.points(name, batch)[False]
            if wanted:
                wanted.kept[id(batch)] = targets[id(batch)][False]


class _ResidualStream:
    """The residual stream of one model, block by block; the input of the next block is kept per batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.factor = model, families.stream_factor(model)
        self.layers = {(c.block, c.heads): c.layer for c in _output_projections(model)}
        self.kept: dict[int, Tensor] = {}  # (B, T, C)

    def points(self, name: str, batch: Batch) -> dict[bool, Tensor]:
        """Return the stream (B, T, C) in block ``name``: after the heads (True) and after the neurons (False)."""
        before, heads, _, after = self._parts(name, batch)
        return {True: before + self.factor * heads, False: after}

    def refuse_unless_added(self, name: str, batch: Batch) -> None:
        """Raise ValueError if the model changes, by a norm for example, the output projections before the stream."""
        before, heads, neurons, after = (part.float() for part in self._parts(name, batch))
        added = self.factor * (heads + neurons)
        if (before + added - after).norm() > 0.05 * added.norm():
            raise ValueError("this family normalises or scales the outputs of heads and neurons before the residual "
                             "stream, so mode='asymmetric' is impossible; use 'sequential'")

    def _parts(self, name: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return input, output of the heads, output of the neurons, and output of block ``name``; each (B, T, C)."""
        seen: dict[int, Tensor] = {}
        block = self.model.get_submodule(name)
        if (name, True) not in self.layers or (name, False) not in self.layers:
            raise ValueError("the attention or the MLP of this family could not be placed, so mode='asymmetric' cannot "
                             "aim at the stream; use 'sequential'")
        added = self.layers[name, True], self.layers[name, False]
        # only_block first, so that its hook runs first
        with (only_block(self.model, name, self.kept.get(id(batch))),
              inputs_to([block], lambda _, x: seen.update({-1: x})),
              outputs_of((*added, block), lambda i, y: seen.update({i: y}))):
            _forward(self.model, batch)
        heads, neurons = (seen[i].view_as(seen[-1]) for i in (0, 1))
        return seen[-1], heads, neurons, seen[2]


def _gram(now: _ResidualStream, closing: _OutputProjection, batches: list[Batch],
          targets: dict[int, dict[bool, Tensor]]) -> Gram:
    """Return the Gram matrix of one projection over all batches; with ``targets``, with the residuals of the stream."""
    sums, seen = GramAccumulator(closing.layer), []
    for batch in batches:
        with inputs_to([closing.layer], lambda _, x: seen.append(x)):
            points = now.points(closing.block, batch)
        mask = batch["attention_mask"].bool().to(seen[-1].device)
        x = by_prompt(seen.pop(), mask)
        lacking = targets[id(batch)][closing.heads] - points[closing.heads] if targets else None
        sums.add(x[mask], None if lacking is None else lacking[mask] / now.factor)
    return sums.gram()


def _forward(model: Any, batch: Batch) -> None:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    model.base_model(**inputs, use_cache=False)


def _reconstruction(closing: _OutputProjection, columns: Tensor, gram: Gram, held_out: Gram,
                    ridges: tuple[float, ...]) -> Reconstruction:
    """Re-solve the kept columns and set the removed ones to zero; choose the ridge by ``held_out`` if it has tokens."""
    layer, gram = closing.layer, gram.double()
    before, bias = least_squares.affine(layer)
    found = {ridge: least_squares.solve(layer, columns, gram, ridge) for ridge in ridges}
    judge = held_out.double() if held_out.tokens else gram
    ridge = min(ridges, key=lambda r: judge.error(found[r][0] - before, found[r][1] - bias))
    weight, shifted = found[ridge]
    cut = before.clone()
    cut[:, columns] = 0
    families.matrix(layer).copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(shifted)
    whole = gram.size(before, torch.zeros_like(bias))
    return Reconstruction(closing.name, ridge, gram.error(cut - before, torch.zeros_like(bias)) / whole,
                  gram.error(weight - before, shifted - bias) / whole)


