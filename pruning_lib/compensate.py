"""Closed-form compensation: what stays is re-solved so that it stands in for what goes.

Ours, for the plan of any width method.  Heads and neurons leave a block through its two closing projections, and those
are linear: after a cut, the columns that stay get the weights with which, on calibration text, the projection's output
changes least.  That is ridge least squares on the Gram matrix of what enters the projection; nothing is trained, and
the checkpoint stays plain, because only weights change.

The ideas are others': what a removed unit costs *after* the rest is re-solved is the optimal brain surgeon's [1]_, for
whole units ZipLM's [2]_; re-solving the channels that stay by least squares is channel pruning's [3]_; FLAP [4]_ puts
the mean of what went into biases, which least squares does too where a layer has one.
Order of this file: remove · importance · Gram matrices · least squares.

References
----------
.. [1] Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", 1992.
.. [2] Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, arXiv 2302.04089.
.. [3] He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, arXiv 1707.06168.
.. [4] An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, arXiv 2312.11983.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib import families, surgery
from pruning_lib.activations import alone, evaluating, inputs_to, outputs_of
from pruning_lib.plans import Importance, Plan

Batch = Mapping[str, Tensor]
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Repair:
    """What least squares did to one closing projection.

    Attributes
    ----------
    ridge : relative to the mean of the Gram matrix's diagonal
    cut_error, error : change of the projection's output on the calibration tokens, as a share of the output (sums of
        squares), when the columns just go, and after the rest was re-solved
    """

    layer: str
    ridge: float
    cut_error: float
    error: float


def remove(model: nn.Module, plan: Plan, batches: Iterable[Batch], *, ridge: float | Sequence[float] = 0.1,
           sequential: bool = True, progress: bool = True) -> tuple[nn.Module, list[Repair]]:
    """The model without what ``plan`` names, its closing projections re-solved on the given text.

    Parameters
    ----------
    batches : calibration text, dicts of ``input_ids`` and ``attention_mask``, each (B, T); every token weighs the same
    ridge : pull towards the weights as they were, relative to the mean diagonal of the Gram matrix; of several, each
        projection takes the one with the least error on every fifth batch, which is held out for the choice only
        Text is what matters most: with a few thousand tokens a small ridge fits noise, and the error on other text can
        exceed that of the plain cut
    sequential : re-solve block after block, each on what the blocks before it *now* give (2 to 3 passes, one Gram
        matrix in memory at a time); False collects all of them in one pass over the dense model

    Returns
    -------
    the pruned model (a copy; ``model`` stays as it is), and what was done to every projection that lost columns

    Raises
    ------
    ValueError
        when the plan was made for another model, for no or too little text, or activations that are not finite.
    """
    if families.sizes(model) != plan.sizes:
        raise ValueError("the plan was made for a model of other sizes (or this model is pruned already); "
                         "choose a new plan for this model")
    several = isinstance(ridge, Sequence)
    ridges = tuple(ridge) if isinstance(ridge, Sequence) else (float(ridge),)
    if not ridges or min(ridges) < 0:
        raise ValueError(f"ridge={ridge}; give one or more numbers, 0 or larger")
    fit, held_out = _split(list(batches), several)
    work = copy.deepcopy(model)
    lost = {c.name: columns for c in _closing(work) if len(columns := _columns(plan, c))}
    walk = _one_by_one if sequential else _all_at_once
    repairs = []
    with torch.no_grad(), evaluating(work):
        for closing, gram, held in walk(work, [c for c in _closing(work) if c.name in lost], fit, held_out, progress):
            repairs.append(_repair(closing, lost[closing.name], gram, held, ridges))
    return surgery.remove(work, plan, inplace=True), repairs


def importance(model: nn.Module, batches: Iterable[Batch], *, ridge: float = 0.1, rounds: int = 64,
               progress: bool = True) -> Importance:
    """What least squares could not repair if a head or neuron went; larger means keep.

    A head's score is the error of its projection, per token, once the other columns are re-solved:
    ``trace(W_h inverse(G)_hh^-1 W_h^T) / tokens``.  Neurons go in ``rounds`` of equal size, the cheapest first, and the
    rest is re-solved in between, so that of two that can stand in for each other one stays; their score is what all
    rounds before theirs have cost, and they themselves.

    Parameters
    ----------
    batches : as in ``remove``
    ridge : as in ``remove``
    rounds : 1 asks every neuron alone, as for heads; 0 < rounds

    Returns
    -------
    Importance with heads (L, H) and neurons (L, M), sums of squares of the residual stream
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; give at least 1")
    scores: dict[bool, list[Tensor]] = {True: [], False: []}
    with torch.no_grad(), evaluating(model):
        for closing, gram, _ in _all_at_once(model, _closing(model), list(batches), [], progress):
            gram = gram.double()
            G = _damped(gram.square if closing.layer.bias is None else gram.centred(), ridge)
            found = _elimination(G, closing.layer.weight.double(), closing.width, 1 if closing.heads else rounds)
            scores[closing.heads].append(found / gram.tokens)
    return Importance(torch.stack(scores[True]).float().cpu(), torch.stack(scores[False]).float().cpu(),
                      {"method": "repair", "ridge": ridge, "rounds": rounds, "tokens": gram.tokens})


@dataclass(frozen=True)
class Gram:
    """What least squares has to know of the inputs x of one projection: sums over tokens."""

    square: Tensor  # (F, F) of x x^T
    total: Tensor  # (F,) of x
    tokens: int

    def double(self) -> Gram:
        """In float64."""
        return Gram(self.square.double(), self.total, self.tokens)

    def centred(self) -> Tensor:
        """(F, F) around the mean of x."""
        return self.square - torch.outer(self.total, self.total) / self.tokens

    def size(self, weight: Tensor, bias: Tensor) -> float:
        """Sum over tokens of the squared norm of ``weight x + bias``; weight (C, F), bias (C,)."""
        return float(((weight @ self.square) * weight).sum() + 2 * bias @ (weight @ self.total)
                     + self.tokens * bias.pow(2).sum())


@dataclass(frozen=True)
class _Closing:
    """One closing projection; ``width`` columns belong to one unit."""

    name: str
    block: str
    layer: nn.Linear
    heads: bool
    width: int


def _closing(model: nn.Module) -> list[_Closing]:
    """The closing projections in the order data passes them: of each block, after its heads and after its neurons."""
    family, D = families.of(model), families.head_width(model)
    names = [info.name for info in families.residual_blocks(model)]
    return [_Closing(f"{name}.{path}", name, families.linear(model.get_submodule(name), path), heads, D if heads else 1)
            for name in names for path, heads in ((family.heads_out, True), (family.neurons_out, False))]


def _columns(plan: Plan, closing: _Closing) -> Tensor:
    """The columns of a closing projection that go."""
    units = (plan.removed_heads if closing.heads else plan.neurons)[int(closing.block.rpartition(".")[2])]
    return (units[:, None] * closing.width + torch.arange(closing.width)).flatten()


def _split(batches: list[Batch], apart: bool) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit on, and every fifth one to choose by."""
    if not batches or (apart and len(batches) < 2):
        raise ValueError(f"{len(batches)} batches of calibration text; give at least {1 + apart}"
                         + ", so that one can be held out to choose the ridge" * apart)
    held = batches[1::5] if apart else []
    return [b for i, b in enumerate(batches) if not apart or i % 5 != 1], held


def _all_at_once(model: nn.Module, closings: list[_Closing], fit: list[Batch], held_out: list[Batch], progress: bool
                 ) -> Iterator[tuple[_Closing, Gram, Gram]]:
    """Gram matrices on the model as it is, from one pass."""
    with tqdm(total=len(fit) + len(held_out), desc="compensate", disable=not progress, leave=False) as bar:
        def run(batch: Batch) -> None:
            _forward(model, batch)
            bar.update()

        found = [_grams(closings, part, run) for part in (fit, held_out)]
    yield from zip(closings, *found, strict=True)


def _one_by_one(model: nn.Module, closings: list[_Closing], fit: list[Batch], held_out: list[Batch], progress: bool
                ) -> Iterator[tuple[_Closing, Gram, Gram]]:
    """Gram matrices on what the blocks in front give when they are asked for; the stream is kept between blocks."""
    streams: dict[int, Tensor] = {}  # of each batch: what enters the block, (B, T, C)

    def run(batch: Batch) -> None:
        with alone(model, name, streams.get(id(batch))):
            _forward(model, batch)

    names = [info.name for info in families.residual_blocks(model)]
    for name in tqdm(names, desc="compensate", disable=not progress, leave=False):
        for closing in (c for c in closings if c.block == name):
            yield closing, *(_grams([closing], part, run)[0] for part in (fit, held_out))  # type: ignore[misc]
        for batch in fit + held_out if name != names[-1] else ():
            streams[id(batch)] = _output(model, name, run, batch)


def _output(model: nn.Module, name: str, run: Callable[[Batch], None], batch: Batch) -> Tensor:
    """What one block gives, (B, T, C), when ``run`` is given the batch."""
    found: list[Tensor] = []
    with outputs_of([model.get_submodule(name)], lambda _, y: found.append(y)):
        run(batch)
    return found[0]


def _grams(closings: list[_Closing], batches: list[Batch], run: Callable[[Batch], None]) -> list[Gram]:
    """A Gram matrix per closing projection, summed over what enters it while ``run`` is given every batch."""
    layers = [c.layer for c in closings]
    kind = torch.promote_types(layers[0].weight.dtype, torch.float32) if layers else torch.float32
    squares = [layer.weight.new_zeros(2 * (layer.in_features,), dtype=kind) for layer in layers]
    totals = [layer.weight.new_zeros(layer.in_features, dtype=torch.float64) for layer in layers]
    tokens = 0

    def see(i: int, x: Tensor) -> None:
        x = x[mask].to(kind)  # (tokens, F)
        squares[i].addmm_(x.T, x)
        totals[i] += x.sum(0, dtype=torch.float64)

    with inputs_to(layers, see):
        for batch in batches:
            mask = batch["attention_mask"].bool().to(layers[0].weight.device) if layers else batch["attention_mask"]
            tokens += int(mask.sum())
            run(batch)
    if not all(torch.isfinite(square).all() for square in squares):
        raise ValueError("activations are not finite; load the model in float32 or bfloat16, not float16")
    return [Gram(square, total, tokens) for square, total in zip(squares, totals, strict=True)]


def _forward(model: Any, batch: Batch) -> None:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    model.base_model(**inputs, use_cache=False)


def _repair(closing: _Closing, columns: Tensor, gram: Gram, held_out: Gram, ridges: tuple[float, ...]) -> Repair:
    """Re-solve the columns that stay, put those that go to zero; the best ridge by ``held_out`` where there is one."""
    layer, gram = closing.layer, gram.double()
    before, bias = _affine(layer)
    found = {ridge: _least_squares(layer, columns, gram, ridge) for ridge in ridges}
    judge = held_out.double() if held_out.tokens else gram
    ridge = min(ridges, key=lambda r: judge.size(found[r][0] - before, found[r][1] - bias))
    weight, shifted = found[ridge]
    cut = before.clone()
    cut[:, columns] = 0
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(shifted)
    whole = gram.size(before, torch.zeros_like(bias))
    return Repair(closing.name, ridge, gram.size(cut - before, torch.zeros_like(bias)) / whole,
                  gram.size(weight - before, shifted - bias) / whole)


def _least_squares(layer: nn.Linear, columns: Tensor, gram: Gram, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (C, F) with ``columns`` at zero, and bias (C,), that change the output least; float64."""
    weight, bias = _affine(layer)
    stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    stays[columns] = False
    G = gram.square if layer.bias is None else gram.centred()
    new = torch.zeros_like(weight)
    new[:, stays] = weight[:, stays] + _solve(G[stays][:, stays], G[stays][:, ~stays] @ weight[:, ~stays].T, ridge).T
    if layer.bias is not None:
        bias = bias + (weight - new) @ gram.total / gram.tokens  # the mean output stays what it was
    return new, bias


def _solve(G: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``inverse(G + ridge) right``; without a ridge the smallest of all solutions, as G may have no inverse."""
    if ridge == 0:
        return torch.linalg.lstsq(G.cpu(), right.cpu(), driver="gelsd").solution.to(G.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(_damped(G, ridge)))


def _damped(G: Tensor, ridge: float) -> Tensor:
    damped = G.clone()
    damped.diagonal().add_(ridge * G.diagonal().mean() + torch.finfo(G.dtype).tiny)  # a layer that is silent has G = 0
    return damped


def _elimination(G: Tensor, weight: Tensor, width: int, rounds: int) -> Tensor:
    """What it costs (F / width,) when a unit goes: all rounds before its own, and itself.

    ``inverse(G)`` and the weights are brought up to date for what went, as in [2]_.
    """
    inverse, weight, spent = torch.cholesky_inverse(torch.linalg.cholesky(G)), weight.clone(), 0.0
    units = torch.arange(len(G), device=G.device).view(-1, width)
    left, score = torch.arange(len(units), device=G.device), G.new_zeros(len(units))
    for part in left.chunk(rounds):
        error, order = (spent + _errors(inverse, weight, units[left])).sort()
        gone, left = left[order[:len(part)]], left[order[len(part):]]
        score[gone] = error[:len(part)]
        spent += float((error[:len(part)] - spent).sum())
        columns = units[gone].flatten()
        repair = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight -= weight[:, columns] @ repair
        inverse -= inverse[:, columns] @ repair
    return score


def _errors(inverse: Tensor, weight: Tensor, units: Tensor) -> Tensor:
    """Error (units,) of each unit alone, ``units`` (units, width) being its columns, once the rest is re-solved."""
    if units.shape[1] == 1:
        return weight[:, units[:, 0]].pow(2).sum(0) / inverse.diagonal()[units[:, 0]]
    return torch.stack([(weight[:, u].T * torch.linalg.solve(inverse[u][:, u], weight[:, u].T)).sum() for u in units])


def _affine(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Copies of weight (C, F) and bias (C,) of a layer in float64; without a bias, zeros."""
    weight = layer.weight.detach().clone().double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone().double()
