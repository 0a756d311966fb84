"""Speed of prefill and decoding of language models, measured side by side.

Prefill (reading a prompt) is bound by arithmetic.  Decoding (one token after the other) is bound by memory bandwidth
for the weights, until many sequences share them.  So the two have different upper bounds, see ``upper_bound``.
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

COVERED = 0.95  # confidence level of an interval of a median


@dataclass(frozen=True)
class Speed:
    """Times of one model, one number per repetition.

    Attributes
    ----------
    prefill_s : seconds to read the prompts
    token_s : seconds per decoding step, which yields one token for every sequence of the batch
    cache_bytes : bytes of keys and values of prompt and answer, for the whole batch
    """

    prefill_s: Sequence[float]
    token_s: Sequence[float]
    cache_bytes: int


@dataclass(frozen=True)
class UpperBound:
    """Largest possible speedup: prefill limited by arithmetic only, decoding by memory traffic only."""

    prefill: float
    decode: float


def measure(models: Mapping[str, nn.Module], ids: Tensor, *, new_tokens: int = 16, repetitions: int = 9,
            warmup: int = 2, graphs: bool = False) -> dict[str, Speed]:
    """Measure the time of prefill and of greedy decoding for each model, on its own device.

    The models take turns within every repetition, so a temporary slowdown of the machine affects all of them.

    Parameters
    ----------
    ids : prompts (B, T), integers, without padding
    new_tokens : number of generated tokens, at least 2; the first comes from the prefill
    graphs : record prefill and decoding step as CUDA graphs once, and replay them.  On a fast GPU a step of a small
        batch ends before Python has launched the next operation; a graph avoids this delay, as inference servers do

    Raises
    ------
    ValueError
        for too few tokens or repetitions, or for graphs without a GPU.
    """
    if graphs and not ids.is_cuda:
        raise ValueError("graphs=True needs a GPU and prompts on it; without a GPU, use graphs=False")
    if new_tokens < 2 or repetitions < 6 or ids.numel() == 0:
        raise ValueError(f"new_tokens={new_tokens}, repetitions={repetitions}, ids of shape {tuple(ids.shape)}; "
                         f"give at least 2, 6 (fewer give no interval), and one token")
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
    """Return the greedy continuation (B, ``new_tokens``) of prompts without padding; no token ends it early."""
    with evaluating(model):
        return torch.cat([token for token, _ in _steps(model, ids, new_tokens)], dim=1)


def upper_bound(dense: nn.Module, pruned: nn.Module, ids: Tensor, cache_bytes: tuple[int, int] = (0, 0)) -> UpperBound:
    """Return the largest possible speedup of ``pruned``: multiply-adds limit prefill, bytes read limit decoding.

    Parameters
    ----------
    cache_bytes : bytes of the caches of dense and pruned, read at every decoding step in addition to the weights
    """
    inputs: Any = {"input_ids": ids, "logits_to_keep": 1}
    macs = [cost.macs(model, inputs) for model in (dense, pruned)]
    fetched = [weight_bytes(model) + cache for model, cache in zip((dense, pruned), cache_bytes, strict=True)]
    return UpperBound(macs[0] / macs[1], fetched[0] / fetched[1])


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights read by a decoding step: all except an input embedding that is not tied."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is embedding.weight
    return sum(p.nbytes for p in model.parameters() if tied or p is not embedding.weight)


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of repetitions and its distribution-free confidence interval of at least 95 %.

    The ends are the k-th lowest and k-th highest repetition, with the largest allowed k: the true median lies outside
    them with probability 2 P(Binomial(n, 1/2) < k).

    Raises
    ------
    ValueError
        for fewer than 6 repetitions; they cannot give such an interval.
    """
    if len(values) < 6:
        raise ValueError(f"{len(values)} repetitions give no interval of {COVERED:.0%}; give at least 6")
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outside, k = 2 * 0.5 ** n, 0  # for k = 1
    while outside <= 1 - COVERED:
        k += 1
        outside += 2 * math.comb(n, k) * 0.5 ** n
    return middle, ordered[k - 1], ordered[n - k]


def speedup(dense: Sequence[float], pruned: Sequence[float]) -> tuple[float, float, float]:
    """Return the speedup factor with its interval, from repetitions measured in turn."""
    return median([one / other for one, other in zip(dense, pruned, strict=True)])


def _once(model: nn.Module, steps: Iterator[tuple[Tensor, Any]], new_tokens: int) -> tuple[float, float, int]:
    """Return seconds of prefill, seconds per decoded token, and bytes of the final cache."""
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
    """Yield the token (B, 1) of every greedy step and the cache after it; the first step is the prefill."""
    cache = None
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        yield ids, cache


class _Steps:
    """Greedy decoding with a cache of its full size from the start, so every step does the same work.

    On a GPU both kinds of steps, prefill and decoding, are recorded as graphs.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, ids: Tensor, new_tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.new_tokens = model, new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens)  # type: ignore[arg-type]
        self.token = ids.new_zeros(len(ids), 1)
        with evaluating(model):
            self._step(ids)  # allocates the cache
            self.read, self.write = (self._recorded(given) for given in (ids.clone(), self.token))

    @torch.inference_mode()  # the cache was allocated in inference mode
    def replay(self) -> Iterator[tuple[Tensor, Any]]:
        """Return an iterator like ``_steps``, but with one token tensor that every step overwrites."""
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
        with torch.cuda.stream(stream):  # libraries initialise outside of the recording
            for _ in range(2):
                self.cache.reset()
                self._step(ids)
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(ids)
        return graph.replay
