"""The same rows on any Dask cluster: one task per row, results returned to the client and written by it alone.

A worker runs a row in a process of its own, in a folder of its own, and gives page and record back as texts.  A worker
that dies is Dask's affair: the row goes to another one.
Order of this file: what a worker does · the client.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from distributed import Client, Future

from pruning_lib import _locks
from pruning_lib.experiments import code_digests, execution, input_digests, staleness
from pruning_lib.experiments.local import POLL_S, Queue
from pruning_lib.experiments.runs import Row, Tree, source
from pruning_lib.experiments.worker import Outcome, RowProcess


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Run a row on a worker.

    Parameters
    ----------
    job : row, notebook (its text), records (name -> text, what a reading reads), code and inputs (digests, as
        the client has them), folder

    Returns
    -------
    kind, message as in ``process.Answer``; page, record, partial page: texts, or None
    """
    row = Row(**job["row"])
    with tempfile.TemporaryDirectory(prefix=f"{row.name}-") as folder:
        tree = Tree(*(Path(folder) / part for part in ("notebooks", "pages", "records", "failed")))
        _write({tree.notebooks / f"{row.notebook}.ipynb": job["notebook"],
                **{tree.records / name: text for name, text in job["records"].items()}})
        other = code_digests.changed(job["code"], staleness.code_of(row, tree))
        if other:
            return asdict(Outcome("failed", f"row {row.name}: {socket.gethostname()} has another pruning_lib "
                                           f"({', '.join(other[:3])}); install the same version there"))
        here = input_digests.digests_of(row, tree)
        other = [name for name in input_digests.changed(job["inputs"], here) if name in here]
        if other:
            return asdict(Outcome("failed", f"row {row.name}: {socket.gethostname()} has another {', '.join(other)} "
                                           f"than the client; put the same files there"))
        answer = _watched(row, tree, job["folder"] if os.path.isdir(job["folder"]) else None)
        found = {"page": tree.page(row), "partial": tree.failed / f"{row.name}.ipynb",
                 **({} if row.reading else {"record": tree.record(row)})}
        return {**asdict(answer), **{k: path.read_text() for k, path in found.items() if path.is_file()}}


def _watched(row: Row, tree: Tree, folder: str | None) -> Outcome:
    process = RowProcess(row, tree, folder=folder)
    try:
        while (answer := process.answer()) is None:
            process.watch()
            time.sleep(POLL_S)
        return answer
    finally:
        process.kill()


def _write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# --- the client -------------------------------------------------------------------------------------------------------


def run(rows: Sequence[Row], tree: Tree, scheduler: str, *, retries: int = 1, log: Callable[[str], None] = print,
        up_to_date: Callable[[Row], bool] = lambda row: False) -> list[str]:
    """Run rows on the cluster of ``scheduler``; returns the names of those that failed.

    Parameters
    ----------
    retries : how often a row whose process died, though its worker did not, is run again
    up_to_date : asked when a row's turn comes; those it says yes to are left out

    Raises
    ------
    SystemExit
        when there is no scheduler at that address.
    """
    try:
        client = Client(scheduler, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"no scheduler at {scheduler}: {error}") from None
    with client:
        return _Run(rows, tree, client, retries, log, up_to_date).all()


class _Run:
    def __init__(self, rows: Sequence[Row], tree: Tree, client: Client, retries: int, log: Callable[[str], None],
                 up_to_date: Callable[[Row], bool]) -> None:
        self.tree, self.client, self.up_to_date = tree, client, up_to_date
        threads = sum(client.nthreads().values())
        log(f"{len(rows)} row(s), {threads} at a time on {len(client.nthreads())} worker(s)")
        self.waiting = Queue(rows, tree, threads, retries, log)
        self.tries: Counter[str] = Counter()
        self.sent: dict[Future, tuple[Row, ExitStack, dict[str, Any], float]] = {}

    def all(self) -> list[str]:
        try:
            while self.waiting.rows or self.sent:
                for row in self.waiting.ready([row for row, _, _, _ in self.sent.values()]):
                    self._begin(row)
                for future in [future for future in self.sent if future.done()]:
                    self._collect(future)
                time.sleep(POLL_S)
        finally:
            self.client.cancel(list(self.sent))
            for _, lock, _, _ in self.sent.values():
                lock.close()
        return self.waiting.progress.failed

    def _begin(self, row: Row) -> None:
        """Send a row to the cluster, under the lock of this tree, unless it is somebody else's or need not run."""
        lock = ExitStack()
        try:
            lock.enter_context(_locks.lock(self.tree.lock(row), wait=False))
        except _locks.Held as who:
            self.waiting.leave(row, str(who))
            return
        except OSError as error:  # a full disk, which concerns the rows that come to write on it
            self.waiting.rows.remove(row)
            self._finished(row, lock, Outcome("failed", f"row {row.name} failed: {error}"))
            return
        self.waiting.rows.remove(row)
        if self.tree.published_ns(row) != self.waiting.published[row.name]:
            self._finished(row, lock, Outcome("done", "done by another runner"))
        elif self.up_to_date(row):
            self._finished(row, lock, Outcome("done", "up to date"))
        else:
            self._send(row, lock)

    def _send(self, row: Row, lock: ExitStack) -> None:
        made, records = staleness.provenance(row, self.tree), {}
        if row.reading:
            records = {path.name: path.read_text() for path in self.tree.records.glob("*.json")}
        job = {"row": asdict(row), "notebook": source(row, self.tree).read_text(),
               "records": records, "code": made["code"], "inputs": made["inputs"],
               "folder": str(Path.cwd())}
        self.tries[row.name] += 1  # else Dask would give back what it already has
        digest = sha256(json.dumps([job, self.tries[row.name]], sort_keys=True).encode()).hexdigest()[:16]
        future = self.client.submit(work, job, key=f"{row.name}-{digest}", resources=dict(row.resources) or None)
        self.sent[future] = (row, lock, made, time.monotonic())
        if missed := self._missed(row):
            self.waiting.log(f"{row.name}: waits for a worker with {missed}; none has that much now. "
                             f"Start one with: dask worker ... --resources {missed.replace(', ', ' ')}")

    def _missed(self, row: Row) -> str:
        """What the row wants and no worker offers so far, as ``GPU=2``; workers may still come."""
        workers = [worker["resources"] for worker in self.client.scheduler_info()["workers"].values()]
        enough = any(all(there.get(name, 0) >= amount for name, amount in row.resources.items()) for there in workers)
        return "" if enough else ", ".join(f"{name}={amount:g}" for name, amount in row.resources.items())

    def _collect(self, future: Future) -> None:
        row, lock, made, began = self.sent.pop(future)
        answer, texts = self._answer(row, future)
        try:
            if answer.kind == "done":
                execution.publish(row, self.tree, texts["page"], texts.get("record"), made)
            elif "partial" in texts:
                kept = self.tree.failed / f"{row.name}.ipynb"
                _write({kept: texts["partial"]})
                why = answer.message.splitlines()[0]
                answer = Outcome(answer.kind, f"{why}\nthe partial page is {kept}; published pages and records are as "
                                             f"they were")
        except OSError as error:
            answer = Outcome("failed", f"row {row.name} failed: {error}")
        if self.waiting.should_retry(row, answer):
            self._send(row, lock)
        else:
            self._finished(row, lock, answer, (time.monotonic() - began) / 60)

    def _answer(self, row: Row, future: Future) -> tuple[Outcome, dict[str, str]]:
        """What came back, or why nothing did."""
        if future.status == "finished":
            texts = future.result()
            return Outcome(texts.pop("kind"), texts.pop("message")), texts
        if future.status == "error":
            return Outcome("failed", f"row {row.name} failed: {_in_words(future.exception())}"), {}
        return Outcome("failed", f"row {row.name} was given up: the cluster is gone ({future.status})"), {}

    def _finished(self, row: Row, lock: ExitStack, answer: Outcome, minutes: float = 0) -> None:
        lock.close()
        self.waiting.progress.finished(row, answer, minutes)


def _in_words(error: BaseException) -> str:
    """Why a task failed before it ran, or because of the cluster; Dask opens tasks on scheduler and worker."""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError) or "deserializ" in why:
        return f"scheduler and workers need pruning_lib too, in the same version as here ({why[:200]})"
    return why
