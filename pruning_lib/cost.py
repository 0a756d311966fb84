"""What a network costs: multiply-adds, parameters, time, memory.

Multiply-adds count once (one MAC, two FLOPs), those of convolutions and matrix products only, as counted by PyTorch's
own counter; batch norms, activations and additions are left out, as in most tables of pruning papers.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruning_lib.activations import evaluating


def macs(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> int:
    """Multiply-adds of one forward pass of these inputs; divide by their number for one image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(model), counter:
        _forward(model, inputs)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def latency(model: nn.Module, inputs: Tensor | Mapping[str, Tensor], *, repetitions: int = 20, warmup: int = 3
            ) -> dict[str, float]:
    """Seconds of a forward pass of these inputs.

    Returns
    -------
    ``latency_s`` (median), ``latency_low_s`` and ``latency_high_s`` (quartiles), ``repetitions``
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions}; give at least 1")
    seconds = []
    with torch.inference_mode(), evaluating(model):
        for i in range(warmup + repetitions):
            _finish()
            start = time.perf_counter()
            _forward(model, inputs)
            _finish()
            if i >= warmup:
                seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"latency_s": median, "latency_low_s": low, "latency_high_s": high, "repetitions": repetitions}


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """By how much memory rises above its level before while ``work`` runs; None where the system cannot say.

    On a GPU, what PyTorch allocates.  On a CPU, the resident memory of the whole process, so run nothing beside it.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        _finish()
        return torch.cuda.max_memory_allocated() - before
    level = _level()
    work()
    return None if level is None else _high_water() - level


def _level() -> int | None:
    """Resident memory now, from which on its peak is recorded; None where the system cannot say."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, else it would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        return _high_water()
    except (OSError, AttributeError, IndexError):  # no Linux, or a kernel without these files or this line
        return None


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _forward(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> None:
    model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def _finish() -> None:
    """Wait for the GPU, which works beside the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
