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
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models import families, surgery
from pruning_lib.models.hooks import by_prompt, evaluating, inputs_to, only_block, outputs_of, silenced
from pruning_lib.models.plan import Plan
from pruning_lib.pruning import held_out as held_out_text
from pruning_lib.pruning import least_squares
from pruning_lib.pruning.least_squares import Gram, GramAccumulator, Residual
from pruning_lib.pruning.selection import Importance, stacked

Batch = Mapping[str, Tensor]
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ROOM = 12  # inputs of a projection are kept as long as they have no more entries than this many times its weights
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
        each projection takes the one with the least error on every fifth batch, which is held out for this choice;
        the search goes downhill from the ridge of the projection before.
        The amount of text matters most: with a few thousand tokens a small ridge fits noise, and the error on other
        text can exceed that of the plain cut
    mode : ``"one_pass"`` collects all Gram matrices in one pass over the dense model.  ``"sequential"`` re-solves block
        after block, each on the outputs of the *pruned* blocks before it, with one Gram matrix in memory at a time: one
        pass for up to some thousand tokens, two for more, and the attention once more where heads are removed.
        ``"asymmetric"`` is sequential with the residual stream of the dense model as the target, so that each
        projection also corrects the errors of the blocks before it (about 1.5 times as long, and twice the residual
        stream of the calibration text in memory)

    Returns
    -------
    the pruned model (a copy; ``model`` is unchanged), and the result for every projection with removed columns

    Raises
    ------
    ValueError
        when the plan was made for another model, for missing or too little text, for activations that are not finite,
        for ``"asymmetric"`` in a family that normalises its output projections before the residual stream, and for
        modes other than ``"one_pass"`` where blocks share keys and values.

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
    if mode != "one_pass" and getattr(families.text_config(model), "num_kv_shared_layers", None):
        raise ValueError(f"mode={mode!r}: blocks of this model use keys and values of other blocks, so they cannot run "
                         f"one by one; use mode='one_pass'")
    several = isinstance(ridge, Sequence)
    ridges = tuple(ridge) if isinstance(ridge, Sequence) else (float(ridge),)
    if not ridges or min(ridges) < 0:
        raise ValueError(f"ridge={ridge}; give one or more numbers, 0 or larger")
    batches = list(batches)
    held_out_text.refuse_little_text(batches, ridge)
    fit, held_out = held_out_text.split(batches, several)
    work = families.copy_of(model)
    lost = {c.name: columns for c in _output_projections(work) if len(columns := _columns(plan, c))}
    closings = [c for c in _output_projections(work) if c.name in lost]
    reconstructions = []
    with torch.no_grad(), evaluating(work), evaluating(model):
        walk = (_all_at_once(work, closings, fit, held_out, progress) if mode == "one_pass" else
                _one_by_one(work, model if mode == "asymmetric" else None, closings, fit, held_out, progress))
        last: dict[bool, float] = {}  # of heads and of neurons
        for closing, gram, held in walk:
            columns, kind = lost[closing.name], closing.heads
            last[kind] = (ridges[0] if len(ridges) == 1 else
                          least_squares.best_ridge(closing.layer, columns, gram, held, ridges, first=last.get(kind)))
            reconstructions.append(_reconstruction(closing, columns, gram, last[kind]))
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
    return Importance(stacked(scores[True]), stacked(scores[False]),
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
    """Return ``families.output_projections`` in forward order: in each block, that of the heads first."""
    s, names = families.sizes(model), {layer: name for name, layer in model.named_modules()}
    blocks = [info.name for info in families.residual_blocks(model)]
    units = [(i, 0) for i in s.head_blocks] + [(i, 1) for i in s.neuron_blocks]
    widths = (*s.head_widths, *[1] * len(s.neuron_blocks))
    by_unit = dict(zip(units, zip(families.output_projections(model), widths, strict=True), strict=True))
    return [_OutputProjection(names[layer], blocks[i], cast(nn.Linear, layer), kind == 0, width)
            for (i, kind), (layer, width) in sorted(by_unit.items(), key=lambda item: item[0])]


def _columns(plan: Plan, closing: _OutputProjection) -> Tensor:
    """Return the removed columns of an output projection."""
    s, number = plan.sizes, int(closing.block.rpartition(".")[2])
    units = (plan.removed_heads[s.head_blocks.index(number)] if closing.heads else
             plan.neurons[s.neuron_blocks.index(number)])
    return (units[:, None] * closing.width + torch.arange(closing.width)).flatten()


def _all_at_once(model: nn.Module, closings: list[_OutputProjection], fit: list[Batch], held_out: list[Batch],
                 progress: bool) -> Iterator[tuple[_OutputProjection, Gram, Gram]]:
    """Yield Gram matrices of the unchanged model, all collected in one pass before the first is used."""
    layers = [c.layer for c in closings]
    yield from zip(closings, *(grams(model, layers, part, progress=progress) for part in (fit, held_out)), strict=True)


def _one_by_one(work: nn.Module, dense: nn.Module | None, closings: list[_OutputProjection], fit: list[Batch],
                held_out: list[Batch], progress: bool) -> Iterator[tuple[_OutputProjection, Gram, Gram]]:
    """Yield Gram matrices on the present outputs of the blocks in front; with ``dense``, the residuals too."""
    now, wanted = _ResidualStream(work), None if dense is None else _ResidualStream(dense)
    names, batches = [info.name for info in families.residual_blocks(work)], fit + held_out
    if wanted:
        wanted.refuse_unless_added(names[0], batches[0])
    for name in tqdm(names, desc="reconstruct", disable=not progress, leave=False):
        targets = {id(batch): wanted.points(name, batch) for batch in batches} if wanted else {}
        for closing in (c for c in closings if c.block == name):
            yield closing, *(now.gram(closing, part, targets) for part in (fit, held_out))  # type: ignore[misc]
        for batch in batches if name != names[-1] else ():
            now.kept[id(batch)] = now.behind(name, batch)
            if wanted:
                wanted.kept[id(batch)] = targets[id(batch)][False]


@dataclass(frozen=True)
class _Seen:
    """Parts of the residual stream in one block, of one batch, each (B, T, C): input, two terms added to it, output."""

    before: Tensor
    heads: Tensor
    neurons: Tensor
    after: Tensor
    x: Tensor  # the input of the projection that was asked for


class _ResidualStream:
    """The residual stream of one model, block by block; the input of the next block is kept per batch.

    The neurons of a block are kept as well, as long as they take no more memory than the solver did: with the stream
    after the heads, they give the output of the block without running it again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.factor = model, families.stream_factor(model)
        self.layers = {(c.block, c.heads): c.layer for c in _output_projections(model)}
        self.kept: dict[int, Tensor] = {}  # (B, T, C), in front of the block, or after its heads where neurons are kept
        self.neurons: dict[int, Tensor] = {}  # (B, T, M)

    def points(self, name: str, batch: Batch) -> dict[bool, Tensor]:
        """Return the stream (B, T, C) in block ``name``: after the heads (True) and after the neurons (False)."""
        seen = self._run(name, batch)
        return {True: seen.before + self.factor * seen.heads, False: seen.after}

    def behind(self, name: str, batch: Batch) -> Tensor:
        """Return the stream (B, T, C) after block ``name`` with the present weights."""
        if id(batch) not in self.neurons:
            return self._run(name, batch).after
        stream, x = self.kept[id(batch)], self.neurons.pop(id(batch))
        return stream + self.factor * self.layers[name, False](x).view_as(stream)

    def gram(self, closing: _OutputProjection, batches: list[Batch], targets: dict[int, dict[bool, Tensor]]) -> Gram:
        """Return the Gram matrix of one projection; with ``targets``, with the residuals of the stream."""
        sums, added = GramAccumulator(closing.layer), False
        for i, batch in enumerate(batches):
            whole = i == 0 or bool(targets)
            seen = self._run(closing.block, batch, of=closing.layer, silent=() if whole else self._not_before(closing))
            middle, mask = seen.before + self.factor * seen.heads, batch["attention_mask"].bool().to(seen.x.device)
            lacking = targets[id(batch)][closing.heads] - (middle if closing.heads else seen.after) if targets else None
            sums.add(by_prompt(seen.x, mask)[mask], None if lacking is None else lacking[mask] / self.factor)
            if i == 0:  # bit for bit, which shows that the block adds both to the stream, the heads first
                added = not closing.heads and torch.equal(middle + self.factor * seen.neurons, seen.after)
            if added and self._has_room(closing.layer, seen.x):
                self.kept[id(batch)], self.neurons[id(batch)] = middle, seen.x
        return sums.gram()

    def refuse_unless_added(self, name: str, batch: Batch) -> None:
        """Raise ValueError if the model changes, by a norm for example, the output projections before the stream."""
        seen = self._run(name, batch)
        added = self.factor * (seen.heads.float() + seen.neurons.float())
        if (seen.before.float() + added - seen.after.float()).norm() > 0.05 * added.norm():
            raise ValueError("this family normalises or scales the outputs of heads and neurons before the residual "
                             "stream, or has parts that could not be placed, so mode='asymmetric' is impossible; use "
                             "'sequential'")

    def _has_room(self, layer: nn.Linear, x: Tensor) -> bool:
        return sum(other.numel() for other in self.neurons.values()) + x.numel() <= ROOM * layer.weight.numel()

    def _not_before(self, closing: _OutputProjection) -> list[nn.Module]:
        """Return layers of the block whose results do not enter the projection: its own, and those of the neurons."""
        block, number = self.model.get_submodule(closing.block), int(closing.block.rpartition(".")[2])
        silent: list[nn.Module] = [self.layers[closing.block, False]] if (closing.block, False) in self.layers else []
        if closing.heads:
            units: dict[str, set[str]] = {}
            own = families.family_of(self.model).of_block(number)
            for part in families.block_parts(block, own, families.head_width(self.model, number)):
                units.setdefault(part.parameter, set()).add(part.unit)
            silent += [block.get_submodule(path.removesuffix(".weight")) for path, kinds in units.items()
                       if kinds == {"neurons"} and path.endswith(".weight")]
        return [layer for layer in dict.fromkeys(silent) if isinstance(layer, nn.Linear)]

    def _run(self, name: str, batch: Batch, of: nn.Linear | None = None, silent: Sequence[nn.Module] = ()) -> _Seen:
        """Run block ``name`` on a batch; the layers ``silent`` give zeros."""
        seen: dict[int, Tensor] = {}
        block = self.model.get_submodule(name)
        added = [self.layers.get((name, heads)) for heads in (True, False)]
        # only_block first, so that its hook runs first; copies, since Falcon adds the heads to the neurons in place
        with (only_block(self.model, name, self.kept.get(id(batch))), silenced(silent),
              inputs_to([block, *filter(None, [of])], lambda i, x: seen.update({-1 - i: x})),
              outputs_of([layer for layer in (*added, block) if layer is not None],
                         lambda i, y: seen.update({i: y.clone()}))):
            _forward(self.model, batch)
        places = iter(range(3))
        heads, neurons, after = (torch.zeros_like(seen[-1]) if layer is None else seen[next(places)].view_as(seen[-1])
                                 for layer in (*added, block))
        return _Seen(seen[-1], heads, neurons, after, seen.get(-2, seen[-1]))


def _forward(model: Any, batch: Batch) -> None:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    model.base_model(**inputs, use_cache=False)


def _reconstruction(closing: _OutputProjection, columns: Tensor, gram: Gram, ridge: float) -> Reconstruction:
    """Re-solve the kept columns and set the removed ones to zero."""
    layer, kind = closing.layer, gram.square.dtype
    before, bias = least_squares.affine(layer)
    kept = gram.without(columns, before)
    change, shift = least_squares.solution(kept, ridge, bias=layer.bias is not None)
    families.matrix(layer).copy_(least_squares.changed(before, columns, change))
    if layer.bias is not None:
        layer.bias.copy_(bias + shift)
    whole = gram.size(before.to(kind), torch.zeros_like(bias))
    cut, left = cast(Residual, kept.drift).size, kept.to(kind).error(change.to(kind), shift)
    return Reconstruction(closing.name, ridge, cut / whole, left / whole)
