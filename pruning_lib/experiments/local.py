"""Parallel execution of rows on this machine, limited by cores, memory and devices.

Runs come before readings, which read their records.  A row that another process runs is deferred.  A row whose process
died is run again.  Failures do not affect finished rows.
Order of this file: machine · progress · queue · execution.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pruning_lib._extras import extra
from pruning_lib.experiments import records
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.experiments.worker import THREADS, Outcome, RowProcess

with extra("report"):
    import psutil

USUAL_GB = 3.0  # assumed memory of a row without memory_gb when rows run in parallel
POLL_S = 0.1
HELD_S = 2.0  # until a deferred row is tried again


@dataclass(frozen=True)
class Machine:
    """Resources of a machine for all rows together.

    Attributes
    ----------
    jobs : number of parallel rows
    threads : threads per row, so that all rows together do not exceed the cores
    memory_gb : memory of all rows together, in GB
    devices : name -> indices of the devices
    """

    jobs: int
    threads: int
    memory_gb: float
    devices: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def here(cls, jobs: int = 0, memory_gb: float = 0) -> Machine:
        """Return the resources of this machine; ``jobs`` 0 for one per core, ``memory_gb`` 0 for free memory."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = jobs or cores
        asked = [int(os.environ[name]) for name in THREADS if os.environ.get(name, "").isdigit()]
        threads = max(1, min([cores // jobs, *asked]))
        return cls(jobs, threads, memory_gb or _free_gb(), {"GPU": _gpus()})


def _free_gb(container: Path = Path("/sys/fs/cgroup")) -> float:
    """Return free memory in GB, within the limit of the container if there is one."""
    free = psutil.virtual_memory().available
    try:
        limit = int((container / "memory.max").read_text())
        free = min(free, limit - int((container / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return free / 1e9


def _gpus() -> list[int]:
    """Return the indices of usable GPUs as reported by ``nvidia-smi``."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [int(text) for text in named.split(",") if text.strip().isdigit()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


class Progress:
    """Progress messages with an estimate of the remaining time from earlier records."""

    def __init__(self, rows: Sequence[Row], tree: Tree, at_a_time: int, log: Callable[[str], None],
                 warn: Callable[[str], None] | None = None) -> None:
        self.expected = {row.name: _minutes(row, tree) for row in rows}
        self.left, self.total, self.tree = dict.fromkeys(self.expected), len(rows), tree
        self.at_a_time, self.log, self.warn = at_a_time, log, warn or log
        self.took: list[float] = []
        self.failed: list[str] = []

    def finished(self, row: Row, outcome: Outcome, minutes: float) -> None:
        """Count a row and log its outcome."""
        self.left.pop(row.name, None)
        if outcome.kind == "done":
            self.took += [] if outcome.message else [minutes]  # a message: done by another process, or up to date
            what = outcome.message or f"done in {minutes:.1f} min, {self.tree.page(row)}"
            self.log(f"[{self.total - len(self.left)}/{self.total}] {row.name}: {what}{self.estimate()}")
        else:
            self.failed.append(row.name)
            self.warn(f"[{self.total - len(self.left)}/{self.total}] {outcome.message}")

    def estimate(self) -> str:
        """Return the remaining time as text, from earlier records or else from the mean of finished rows."""
        usual = sum(self.took) / len(self.took) if self.took else 0
        rest = sum(usual if self.expected[name] is None else self.expected[name] or 0 for name in self.left)
        return f"; about {math.ceil(rest / self.at_a_time)} min left" if self.left else ""


def _minutes(row: Row, tree: Tree) -> float | None:
    made_with = records.contents(tree.record(row)).get("made_with")
    minutes = made_with.get("minutes") if isinstance(made_with, dict) else None
    return minutes if isinstance(minutes, (int, float)) else None


def run(rows: Sequence[Row], tree: Tree, machine: Machine, *, retries: int = 1, log: Callable[[str], None] = print,
        warn: Callable[[str], None] | None = None, up_to_date: Callable[[Row], bool] = lambda row: False) -> list[str]:
    """Run rows in processes of this machine and return the names of failed rows.

    Parameters
    ----------
    retries : number of further attempts after the process of a row died
    warn : function that prints failures; by default ``log``
    up_to_date : predicate evaluated just before a row starts; rows with True are skipped
    """
    running = _Run(rows, tree, machine, retries, log, up_to_date)
    running.progress.warn = warn or log
    return running.all()


class Queue:
    """Queue of waiting rows: readiness, deferral and retries, for local processes and clusters."""

    def __init__(self, rows: Sequence[Row], tree: Tree, at_a_time: int, retries: int,
                 log: Callable[[str], None]) -> None:
        self.rows = list(rows)
        self.progress = Progress(self.rows, tree, max(1, min(at_a_time, len(rows))), log)
        self.published = {row.name: tree.published_ns(row) for row in rows}
        self.log = log
        self._lives = {row.name: retries for row in rows}
        self._again_at: dict[str, float] = {}  # deferred rows

    def ready(self, running: Sequence[Row]) -> list[Row]:
        """Return the rows that may start while others are ``running``; readings wait for all runs."""
        runs = any(not row.reading for row in [*self.rows, *running])
        now = time.monotonic()
        return [row for row in self.rows if not (row.reading and runs) and self._again_at.get(row.name, 0) <= now]

    def defer(self, row: Row, who: str) -> None:
        """Defer a row that another process runs; try it again later, because that process may die."""
        if row.name not in self._again_at:
            self.log(f"{row.name}: left to {who}, which runs it")
        self._again_at[row.name] = time.monotonic() + HELD_S
        if row not in self.rows:
            self.rows.append(row)

    def should_retry(self, row: Row, outcome: Outcome) -> bool:
        """Return True if the process of a row died and attempts are left."""
        again = outcome.kind == "lost" and self._lives[row.name] > 0
        if again:
            self._lives[row.name] -= 1
            self.log(f"{outcome.message}\n{row.name}: once more")
        return again


class _Run:
    def __init__(self, rows: Sequence[Row], tree: Tree, machine: Machine, retries: int, log: Callable[[str], None],
                 up_to_date: Callable[[Row], bool]) -> None:
        self.tree, self.machine, self.up_to_date = tree, machine, up_to_date
        self.waiting = Queue(rows, tree, machine.jobs, retries, log)
        self.progress = self.waiting.progress
        self.running: dict[RowProcess, tuple[float, dict[str, list[int]]]] = {}

    def all(self) -> list[str]:
        try:
            while self.waiting.rows or self.running:
                while (row := self._next()) and self._start(row):
                    pass
                for process in list(self.running):
                    process.watch()
                    if outcome := process.outcome():
                        self._ended(process, outcome)
                time.sleep(POLL_S)
        finally:
            for process in self.running:
                process.kill()
        return self.progress.failed

    def _next(self) -> Row | None:
        """Return the next row that fits into the free resources."""
        if len(self.running) >= self.machine.jobs:
            return None
        return next(filter(self._fits, self.waiting.ready([process.row for process in self.running])), None)

    def _fits(self, row: Row) -> bool:
        taken = [(p.row.memory_gb or USUAL_GB) for p in self.running]
        free = {name: len(self._free(name)) for name in row.resources}
        if self._never_fits(row) or not self.running:
            return True  # a single row always runs, whatever its assumed memory
        return (sum(taken) + (row.memory_gb or USUAL_GB) <= self.machine.memory_gb
                and all(amount <= free[name] for name, amount in row.resources.items()))

    def _free(self, device: str) -> list[int]:
        taken = [number for _, devices in self.running.values() for number in devices.get(device, [])]
        return [number for number in self.machine.devices.get(device, []) if number not in taken]

    def _never_fits(self, row: Row) -> str:
        for name, amount in row.resources.items():
            there = len(self.machine.devices.get(name, []))
            if amount > there:
                return f"row {row.name} needs {amount:g} {name}, this machine has {there}; run it with --scheduler"
        if row.memory_gb > self.machine.memory_gb:
            return f"row {row.name} needs {row.memory_gb:g} GB, there are {self.machine.memory_gb:.1f} GB; see --memory"
        return ""

    def _start(self, row: Row) -> bool:
        self.waiting.rows.remove(row)
        if why := self._never_fits(row):
            self.progress.finished(row, Outcome("failed", why), 0)
        elif self.up_to_date(row):
            self.progress.finished(row, Outcome("done", "up to date"), 0)
        else:
            devices = {name: self._free(name)[:math.ceil(amount)] for name, amount in row.resources.items()}
            environment = dict.fromkeys(THREADS, str(self.machine.threads))
            if "GPU" in devices:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices["GPU"]))
            process = RowProcess(row, self.tree, environment, published_ns=self.waiting.published[row.name])
            self.running[process] = (time.monotonic(), devices)
        return True

    def _ended(self, process: RowProcess, outcome: Outcome) -> None:
        started, _ = self.running.pop(process)
        if outcome.kind == "held":
            self.waiting.defer(process.row, outcome.message)
        elif self.waiting.should_retry(process.row, outcome):
            self.waiting.rows.insert(0, process.row)
        else:
            self.progress.finished(process.row, outcome, (time.monotonic() - started) / 60)
