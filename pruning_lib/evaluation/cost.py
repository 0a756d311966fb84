"""Cost of a model: multiply-adds, parameters, time, memory, energy and carbon.

PyTorch's own counter counts the multiply-adds (one MAC is two FLOPs) of convolutions and matrix products.  Batch norms,
activations and additions are left out, as in most tables of pruning papers.
"""

from __future__ import annotations

import ctypes
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruning_lib._extras import extra
from pruning_lib.models.hooks import evaluating


def macs(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> int:
    """Return the multiply-adds of one forward pass of a batch; divide by the batch size for one image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(model), counter:
        _forward(model, inputs)
    return counter.get_total_flops() // 2


def latency(model: nn.Module, inputs: Tensor | Mapping[str, Tensor], *, repetitions: int = 20, warmup: int = 3
            ) -> dict[str, float]:
    """Measure the time of a forward pass of ``inputs``.

    Returns
    -------
    ``latency_s`` (median), ``latency_low_s`` and ``latency_high_s`` (quartiles), ``repetitions``
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions}; give at least 1")
    seconds = []
    with torch.inference_mode(), evaluating(model):
        for i in range(warmup + repetitions):
            synchronize()
            start = time.perf_counter()
            _forward(model, inputs)
            synchronize()
            if i >= warmup:
                seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"latency_s": median, "latency_low_s": low, "latency_high_s": high, "repetitions": repetitions}


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Return the rise of memory during ``work`` in bytes; None where the system does not report it.

    On a GPU, memory allocated by PyTorch is measured.  On a CPU, the resident memory of the whole process is measured,
    so nothing else should run in the process.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    level = _level()
    work()
    return None if level is None else _high_water() - level


def emissions(work: Callable[[], Any], *, inputs: int, country: str = "BRA", repetitions: int = 6,
              at_least_s: float = 1, idle_s: float = 2) -> dict[str, Any]:
    """Measure or estimate energy and carbon of ``work`` per 1,000 inputs with codecarbon.

    codecarbon runs offline, writes nothing, and tracks this process.  The method depends on the machine and is reported
    as ``how``.  Without a readable counter, the rated power of the processor (4 W per thread if unknown) is multiplied
    by the share of all cores' time that the process used; other processes do not count.  RAPL reads the counter of the
    *whole* processor in every mode, and the counter of a GPU covers the whole GPU.  In these two cases nothing else
    should run on the machine.
    Memory is left out of the sum, because codecarbon assumes a constant power for it, independent of the memory in use;
    ``memory_j`` reports it separately.  Carbon is energy times the mean intensity of the country's grid.

    Parameters
    ----------
    work : called repeatedly; it must not change the state that it depends on
    inputs : number of images or tokens per call
    country : ISO code of three letters; codecarbon must know its energy mix
    repetitions : at least 5; their range is an interval for the median, see ``interval_fraction``
    at_least_s : minimum seconds per repetition; the number of calls follows from the time of the second call.  CPU
        time has a resolution of 0.01 s
    idle_s : seconds of sleep during the measurement of idle power

    Returns
    -------
    ``energy_j``, ``kgco2e``, ``memory_j`` and ``wall_s`` per 1,000 inputs: medians, with the lowest repetition as
    ``_low`` and the highest as ``_high``; ``idle_w``, power during sleep (not subtracted); ``how``.  Values that
    codecarbon cannot measure are None, and ``how`` gives the reason.

    Raises
    ------
    ValueError
        for too few repetitions or inputs, or a country unknown to codecarbon.
    """
    if repetitions < 5 or inputs < 1:
        raise ValueError(f"repetitions={repetitions}, inputs={inputs}; give at least 5 and 1")
    _check_country(country)
    work()  # warm-up
    start = time.perf_counter()
    work()
    calls = max(1, math.ceil(at_least_s / max(time.perf_counter() - start, 1e-6)))
    with _tracking(country) as measured:
        idle = measured(lambda: time.sleep(idle_s), 1)
        found = [measured(lambda: [work() for _ in range(calls)], calls * inputs / 1000) for _ in range(repetitions)]
    values: dict[str, Any] = {"inputs": inputs, "calls": calls, "repetitions": repetitions, "country": country,
                              "interval_fraction": 1 - 0.5 ** (repetitions - 1), "how": found[0]["how"],
                              "idle_w": None if idle["energy_j"] is None else idle["energy_j"] / idle["wall_s"]}
    for key in ("energy_j", "kgco2e", "memory_j", "wall_s"):
        several = [one[key] for one in found]
        known = [value for value in several if value is not None and (value > 0 or key == "memory_j")]
        given = np.quantile(known, [0.5, 0, 1]).tolist() if len(known) == repetitions else [None] * 3
        values.update(zip((key, f"{key}_low", f"{key}_high"), given, strict=True))
    if values["energy_j"] is None:
        values["how"] = f"not measured: {values['how']}"
    return values


def _check_country(country: str) -> None:
    """Raise ValueError for a country unknown to codecarbon, which would silently use the mean of the world."""
    with extra("emissions"):
        from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        raise ValueError(f"codecarbon has no energy mix for country={country!r}; give an ISO code of "
                         f"three letters, such as {', '.join(sorted(known)[:3])} ... {', '.join(sorted(known)[-3:])}")


@contextmanager
def _tracking(country: str) -> Iterator[Callable[[Callable[[], Any], float], dict[str, Any]]]:
    """Yield ``measured(work, units)``: energy in joules, CO2 equivalent in kilograms and seconds, per unit."""
    with extra("emissions"):
        from codecarbon import OfflineEmissionsTracker

    logger = logging.getLogger("codecarbon")
    level, off = logger.level, logger.disabled
    logger.disabled = True
    tracker: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracker = OfflineEmissionsTracker(
                country_iso_code=country, tracking_mode="process", output_methods=[], emissions_endpoint=None,
                electricitymaps_api_token=None, log_level="critical", measure_power_secs=1e6, allow_multiple_runs=True)

        def measured(work: Callable[[], Any], units: float) -> dict[str, Any]:
            start, energies, why = time.perf_counter(), None, ""
            try:
                tracker.start_task()
            except Exception as error:  # the work runs even if the machine or its driver fails
                why = f"{type(error).__name__}: {error}"
            work()
            synchronize()
            seconds = time.perf_counter() - start
            if not why:
                try:
                    energies = tracker.stop_task()
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
            return _of(energies, tracker, why, seconds, units)

        yield measured
    finally:
        logger.disabled = off
        logger.setLevel(level)


def _of(found: Any, tracker: Any, why: str, seconds: float, units: float) -> dict[str, Any]:
    """Return the values of codecarbon per unit; None for missing ones."""
    if found is None:
        return {"energy_j": None, "kgco2e": None, "memory_j": None, "wall_s": seconds / units,
                "how": why or "codecarbon gave nothing"}
    energy = (found.cpu_energy + found.gpu_energy) * 3.6e6  # from kWh
    per_kwh = found.emissions / found.energy_consumed if found.energy_consumed else 0
    return {"energy_j": energy / units, "kgco2e": energy / 3.6e6 * per_kwh / units,
            "memory_j": found.ram_energy * 3.6e6 / units, "wall_s": seconds / units, "how": _how(tracker._hardware)}


def _how(hardware: list[Any]) -> str:
    """Return the method of measurement, counter or estimate, for the processor and the GPU."""
    said = []
    for part in hardware:
        mode = getattr(part, "_mode", None)
        if mode == "cpu_load":
            said.append(f"processor: estimate, {part._tdp:g} W for all cores x share of their time this process used")
        elif mode == "constant":
            said.append(f"processor: estimate, half of {part._tdp:g} W whatever it does")
        elif mode:
            said.append(f"processor: counter ({mode}) of the whole machine")
        elif type(part).__name__ == "GPU":
            said.append("GPU: counter of the whole GPU")
    return "; ".join(said) or "codecarbon found no hardware it knows"


def _level() -> int | None:
    """Reset the recorded peak of resident memory and return the current level; None where unsupported."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system; reusing it would not raise the peak
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        return _high_water()
    except (OSError, AttributeError, IndexError):  # not Linux, or a kernel without these files or this line
        return None


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _forward(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> None:
    model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def synchronize() -> None:
    """Wait until the GPU has finished; do nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
