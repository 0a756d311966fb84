"""Measure the processor time of inference and of tuning, which other processes on the machine do not lengthen.

Processor time counts the seconds that the threads of this process ran.  Unlike time by the clock it does not include
waiting for a busy core; caches and memory are still shared, so a busy machine makes it a little longer.
It stands in for energy where no counter can be read: at a fixed power per core the two are proportional.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning_lib.models.hooks import evaluating


def inference_time(model: nn.Module, pixels: Tensor, *, repetitions: int = 7) -> dict[str, float]:
    """Return processor seconds per 1,000 images of a forward pass of these pixels as one batch.

    Returns
    -------
    ``infer_s`` (median), ``infer_low_s`` and ``infer_high_s`` (lowest and highest), ``repetitions``

    Raises
    ------
    ValueError
        for fewer than one repetition.
    """
    with torch.inference_mode(), evaluating(model):
        return _measured("infer", lambda: model(pixels), len(pixels), repetitions)


def tuning_time(model: nn.Module, pixels: Tensor, labels: Tensor, *, repetitions: int = 7) -> dict[str, float]:
    """Return processor seconds per 1,000 images of forward and backward pass: ``tune_s`` and its ends, as above.

    Weights are not changed; the step of the optimiser, which does not depend on the number of images, is left out.
    """
    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(pixels), labels).backward()

    with evaluating(model):
        found = _measured("tune", step, len(pixels), repetitions)
    model.zero_grad(set_to_none=True)
    return found


def _measured(name: str, work: Callable[[], object], images: int, repetitions: int) -> dict[str, float]:
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions}; give at least 1")
    work()  # warm-up
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        seconds.append((time.process_time() - start) * 1000 / images)
    low, middle, high = np.quantile(seconds, [0, 0.5, 1]).tolist()
    return {f"{name}_s": middle, f"{name}_low_s": low, f"{name}_high_s": high, "repetitions": repetitions}
