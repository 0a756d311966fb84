"""Worker process for one row: start, supervision, end.

The worker ends with its parent, because its standard input is then closed.  It reports its outcome through a pipe;
other output of the notebook is written to a log.
Order of this file: parent side · worker process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pruning_lib import _locks
from pruning_lib._extras import extra
from pruning_lib.experiments import execution
from pruning_lib.experiments.execution import RowFailed, WorkerDied
from pruning_lib.experiments.runs import Row, Tree

with extra("report"):
    import psutil

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
KINDS = ("done", "failed", "lost", "held", "memory")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a row (one of ``KINDS``) and a message."""

    kind: str
    message: str = ""


class RowProcess:
    """A worker process that runs a row.

    Parameters
    ----------
    environment : variables added to the environment of this process
    folder : working folder; None for the current one
    published_ns : modification time of the row's page at queueing; a later page comes from another process, and the
        row is not run again
    """

    def __init__(self, row: Row, tree: Tree, environment: Mapping[str, str] | None = None, *,
                 folder: str | None = None, published_ns: int | None = None) -> None:
        self.row, self.tree, self.too_large_gb = row, tree, 0.0
        self.log = tempfile.TemporaryFile()
        self.answers, theirs = os.pipe()
        code = f"from pruning_lib.experiments import worker; worker.main({theirs})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, pass_fds=(theirs,),
            cwd=folder, env={**os.environ, **_imports_from_here(), **(environment or {})})
        os.close(theirs)
        assert self.process.stdin
        job = {"row": asdict(row), "tree": _paths(tree), "published_ns": published_ns}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()  # stays open: the worker ends when this pipe closes

    def memory_gb(self) -> float:
        """Return the current resident memory of the worker and its kernel together in GB."""
        total = 0
        for member in self._family():
            try:
                total += member.memory_info().rss
            except psutil.Error:  # the process ended meanwhile
                pass
        return total / 1e9

    def watch(self) -> None:
        """Kill the worker if it exceeds the memory limit of its row."""
        if self.row.memory_gb and not self.too_large_gb:
            used = self.memory_gb()
            if used > self.row.memory_gb:
                self.too_large_gb = used
                self.kill()

    def kill(self) -> None:
        """Kill the worker and its kernel immediately."""
        for member in self._family():
            try:
                member.kill()
            except psutil.Error:
                pass

    def outcome(self) -> Outcome | None:
        """Return the outcome, None while the worker runs; delete unfinished files of a killed worker."""
        if self.process.poll() is None:
            return None
        text = b"".join(iter(lambda: os.read(self.answers, 65536), b""))
        os.close(self.answers)
        assert self.process.stdin
        self.process.stdin.close()
        outcome = self._outcome(text)
        if outcome.kind in ("lost", "memory"):
            execution.sweep(self.row, self.tree)
        self.log.close()
        return outcome

    def _outcome(self, text: bytes) -> Outcome:
        name, status = self.row.name, self.process.returncode
        if self.too_large_gb:
            return Outcome("memory", f"row {name} was stopped: it took {self.too_large_gb:.2f} GB, its limit is "
                                    f"{self.row.memory_gb:g} GB (memory_gb in runs.yml)")
        if text:
            return Outcome(**json.loads(text))
        why = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().splitlines()[-3:]
        return Outcome("lost", "\n".join([f"row {name}: its process {why}", *(last if status > 0 else [])]))

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return []


def _imports_from_here() -> dict[str, str]:
    """Return an environment in which the worker imports the same package as this process."""
    ours = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))}


def _paths(tree: Tree) -> dict[str, str]:
    return {name: str(path) for name, path in asdict(tree).items()}


# --- worker process ---------------------------------------------------------------------------------------------------


def main(answers: int) -> None:
    """Run the row given on standard input and write its outcome to the pipe ``answers``."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tree = Tree(**{name: Path(path) for name, path in job["tree"].items()})
    outcome = _run(Row(**job["row"]), tree, job["published_ns"])
    os.write(answers, json.dumps({"kind": outcome.kind, "message": outcome.message[:16000]}).encode())


def _run(row: Row, tree: Tree, published_ns: int | None) -> Outcome:
    by_another = False

    def done() -> bool:
        nonlocal by_another
        by_another = published_ns is not None and tree.published_ns(row) != published_ns
        return by_another

    try:
        execution.run(row, tree, log=lambda text: None, wait=False, done=done)
    except _locks.Held as who:
        return Outcome("held", str(who))
    except WorkerDied as error:
        return Outcome("lost", str(error))
    except RowFailed as error:
        return Outcome("failed", str(error))
    except (Exception, SystemExit) as error:  # any error affects this row only
        return Outcome("failed", f"row {row.name} failed: {type(error).__name__}: {error}")
    return Outcome("done", "done by another runner" if by_another else "")


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would block the exit of Python
        pass
    family: list[Any] = psutil.Process().children(recursive=True)
    for kernel in family:
        kernel.kill()
    os._exit(1)
