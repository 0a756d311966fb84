"""How fast language models read a prompt and write an answer, one beside the other.

Reading a prompt (prefill) is bound by arithmetic; writing (decoding) one token after the other by how fast weights come
from memory, until many sequences share them.  So each has an ideal of its own, see ``upper_bound``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning_lib.evaluation import cost
from pruning_lib.models.hooks import evaluating

COVERED = 0.95  # of an interval of a median


@dataclass(frozen=True)
class Speed:
    """What one model took, a number per repetition.

    Attributes
    ----------
    prefill_s : seconds to read the prompts
    token_s : seconds per step of writing, one token for every sequence of the batch
    cache_bytes : keys and values of prompt and answer, for the whole batch
    """

    prefill_s: Sequence[float]
    token_s: Sequence[float]
    cache_bytes: int


@dataclass(frozen=True)
class UpperBound:
    """By how much a model would be faster, were its time only what it has to compute, or only what it has to fetch."""

    prefill: float
    decode: float


def measure(models: Mapping[str, nn.Module], ids: Tensor, *, new_tokens: int = 16, repetitions: int = 9,
            warmup: int = 2, graphs: bool = False) -> dict[str, Speed]:
    """Time of prefill and of greedy decoding for each model, on the device it is on.

    The models take turns within every repetition, so that what slows the machine down for a while slows all of them.

    Parameters
    ----------
    ids : prompts (B, T), integers, without padding
    new_tokens : how many are written after the prompt, at least 2; the first comes from the prefill
    graphs : record what a model does for a prompt and for a token once, as CUDA graphs, and replay it.  On a fast GPU a
        step of a small batch is over before Python has started its next operation; a graph leaves that wait out, as
        servers of language models do

    Raises
    ------
    ValueError
        for too few tokens or repetitions, and for graphs without a GPU.
    """
    if graphs and not ids.is_cuda:
        raise ValueError("graphs=True needs a GPU and prompts that are on it; without one, measure without graphs")
    if new_tokens < 2 or repetitions < 6 or ids.numel() == 0:
        raise ValueError(f"new_tokens={new_tokens}, repetitions={repetitions}, ids of shape {tuple(ids.shape)}; "
                         f"wanted at least 2, 6 (fewer give no interval), and one token")
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in models}
    recorded = {name: _Steps(model, ids, new_tokens) for name, model in models.items() if graphs}
    for i in range(warmup + repetitions):
        for name, model in models.items():
            once = _once(model, recorded[name].replay() if graphs else _steps(model, ids, new_tokens), new_tokens)
            if i >= warmup:
                seen[name].append(once)
    return {name: Speed([p for p, _, _ in rows], [t for _, t, _ in rows], rows[0][2]) for name, rows in seen.items()}


@torch.inference_mode()
def generate(model: nn.Module, ids: Tensor, new_tokens: int) -> Tensor:
    """The greedy continuation (B, ``new_tokens``) of prompts without padding; stops at no token."""
    with evaluating(model):
        return torch.cat([token for token, _ in _steps(model, ids, new_tokens)], dim=1)


def upper_bound(dense: nn.Module, pruned: nn.Module, ids: Tensor, cache_bytes: tuple[int, int] = (0, 0)) -> UpperBound:
    """How much faster ``pruned`` could be at best: multiply-adds decide prefill, bytes fetched decide decoding.

    Parameters
    ----------
    cache_bytes : of dense and pruned, fetched at every step of decoding beside the weights
    """
    inputs: Any = {"input_ids": ids, "logits_to_keep": 1}
    macs = [cost.macs(model, inputs) for model in (dense, pruned)]
    fetched = [weight_bytes(model) + cache for model, cache in zip((dense, pruned), cache_bytes, strict=True)]
    return UpperBound(macs[0] / macs[1], fetched[0] / fetched[1])


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step of decoding fetches: all but an input embedding that serves nothing else."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is embedding.weight
    return sum(p.nbytes for p in model.parameters() if tied or p is not embedding.weight)


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """Median of repetitions and an interval that holds the true one with 95 % or more, whatever they are spread like.

    The ends are the k-th lowest and k-th highest repetition, k as large as it may be: the true median lies outside them
    with probability 2 P(Binomial(n, 1/2) < k).

    Raises
    ------
    ValueError
        for fewer than 6 repetitions, which cannot give such an interval.
    """
    if len(values) < 6:
        raise ValueError(f"{len(values)} repetitions give no interval of {COVERED:.0%}; at least 6 do")
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outside, k = 2 * 0.5 ** n, 0  # for k = 1
    while outside <= 1 - COVERED:
        k += 1
        outside += 2 * math.comb(n, k) * 0.5 ** n
    return middle, ordered[k - 1], ordered[n - k]


def speedup(dense: Sequence[float], pruned: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster, with its interval, from repetitions that were made in turn."""
    return median([one / other for one, other in zip(dense, pruned, strict=True)])


def _once(model: nn.Module, steps: Iterator[tuple[Tensor, Any]], new_tokens: int) -> tuple[float, float, int]:
    """Seconds of prefill, seconds per written token, bytes of the cache at the end."""
    with torch.inference_mode(), evaluating(model):
        cost.synchronize()
        start = time.perf_counter()
        next(steps)
        cost.synchronize()
        read = time.perf_counter()
        *_, (_, cache) = steps
        cost.synchronize()
        end = time.perf_counter()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return read - start, (end - read) / (new_tokens - 1), held


def _steps(model: nn.Module, ids: Tensor, new_tokens: int) -> Iterator[tuple[Tensor, Any]]:
    """Greedy decoding: the token (B, 1) of every step and the cache after it; the first step reads the prompts."""
    cache = None
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        yield ids, cache


class _Steps:
    """Greedy decoding with a cache that has its full size from the start, so that every step does the same work.

    On a GPU both kinds of steps, reading the prompts and writing a token, are recorded as graphs.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, ids: Tensor, new_tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.new_tokens = model, new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens)  # type: ignore[arg-type]
        self.token = ids.new_zeros(len(ids), 1)
        with evaluating(model):
            self._step(ids)  # here the cache gets its place
            self.read, self.write = (self._recorded(given) for given in (ids.clone(), self.token))

    @torch.inference_mode()  # the cache was made in it
    def replay(self) -> Iterator[tuple[Tensor, Any]]:
        """As ``_steps``, but the token is one tensor that every step overwrites."""
        self.cache.reset()
        return self._replayed()

    def _replayed(self) -> Iterator[tuple[Tensor, Any]]:
        for step in [self.read] + [self.write] * (self.new_tokens - 1):
            step()
            yield self.token, self.cache

    def _step(self, ids: Tensor) -> None:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def _recorded(self, ids: Tensor) -> Callable[[], None]:
        if not ids.is_cuda:
            return lambda: self._step(ids)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up beside the recording, not in it
            for _ in range(2):
                self.cache.reset()
                self._step(ids)
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(ids)
        return graph.replay
