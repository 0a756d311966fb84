"""One row in a process of its own: started, watched, ended.

The process ends with the one that started it, however that ends: its standard input is a line that breaks.  What it has
to say comes through a pipe; what its notebook writes beside goes into a log.
Order of this file: the side that started it · the process itself.
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

import psutil

from pruning_lib import _locks
from pruning_lib.experiments import execution
from pruning_lib.experiments.execution import RowFailed, WorkerDied
from pruning_lib.experiments.runs import Row, Tree

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
KINDS = ("done", "failed", "lost", "held", "memory")


@dataclass(frozen=True)
class Outcome:
    """How a row ended (one of ``KINDS``) and what to say about it."""

    kind: str
    message: str = ""


class RowProcess:
    """A row that is running.

    Parameters
    ----------
    environment : added to that of this process
    folder : where it runs, if not in the current one
    published_ns : when the row's page had appeared when the row was still to be run; one that appeared since is of
        another runner, and the row is not run again
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
        self.process.stdin.flush()  # it stays open: the process ends when this one does

    def memory_gb(self) -> float:
        """Of the process and its kernel together, as they are now."""
        total = 0
        for member in self._family():
            try:
                total += member.memory_info().rss
            except psutil.Error:  # it ended meanwhile
                pass
        return total / 1e9

    def watch(self) -> None:
        """End the process if it takes more memory than its row may."""
        if self.row.memory_gb and not self.too_large_gb:
            used = self.memory_gb()
            if used > self.row.memory_gb:
                self.too_large_gb = used
                self.kill()

    def kill(self) -> None:
        """End the process and its kernel at once."""
        for member in self._family():
            try:
                member.kill()
            except psutil.Error:
                pass

    def answer(self) -> Outcome | None:
        """How it ended; None while it runs.  A process that was killed leaves nothing lying about."""
        if self.process.poll() is None:
            return None
        text = b"".join(iter(lambda: os.read(self.answers, 65536), b""))
        os.close(self.answers)
        assert self.process.stdin
        self.process.stdin.close()
        answer = self._answer(text)
        if answer.kind in ("lost", "memory"):
            execution.sweep(self.row, self.tree)
        self.log.close()
        return answer

    def _answer(self, text: bytes) -> Outcome:
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
    """The process imports the very package that this one did."""
    ours = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))}


def _paths(tree: Tree) -> dict[str, str]:
    return {name: str(path) for name, path in asdict(tree).items()}


# --- the process itself -----------------------------------------------------------------------------------------------


def main(answers: int) -> None:
    """Run the row that standard input names and say into the pipe ``answers`` how it ended."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tree = Tree(**{name: Path(path) for name, path in job["tree"].items()})
    answer = _run(Row(**job["row"]), tree, job["published_ns"])
    os.write(answers, json.dumps({"kind": answer.kind, "message": answer.message[:16000]}).encode())


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
    except (Exception, SystemExit) as error:  # whatever it is, it concerns this row alone
        return Outcome("failed", f"row {row.name} failed: {type(error).__name__}: {error}")
    return Outcome("done", "done by another runner" if by_another else "")


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when Python ends
        pass
    family: list[Any] = psutil.Process().children(recursive=True)
    for kernel in family:
        kernel.kill()
    os._exit(1)
