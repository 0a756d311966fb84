"""Execution of rows on a Dask cluster: one task per row; only the client writes results.

A worker runs a row in its own process and folder and returns page and record as texts.  If a worker dies, Dask sends
the row to another one.
Order of this file: worker · client.
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
from pathlib import Path
from typing import Any

from pruning_lib import _files, _locks
from pruning_lib._extras import extra
from pruning_lib.experiments import code_digests, execution, input_digests, staleness
from pruning_lib.experiments.local import POLL_S, Queue
from pruning_lib.experiments.runs import Row, Tree, source
from pruning_lib.experiments.worker import Outcome, RowProcess

with extra("cluster"):
    from distributed import Client, Future


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Run a row on a worker.

    Parameters
    ----------
    job : row, notebook (its text), records (name -> text, for a reading), code and inputs (digests on the client),
        folder

    Returns
    -------
    kind, message as in ``worker.Outcome``; page, record, partial page: texts, or None
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
        outcome = _watched(row, tree, job["folder"] if os.path.isdir(job["folder"]) else None)
        found = {"page": tree.page(row), "partial": tree.failed / f"{row.name}.ipynb",
                 **({} if row.reading else {"record": tree.record(row)})}
        return {**asdict(outcome), **{k: path.read_text() for k, path in found.items() if path.is_file()}}


def _watched(row: Row, tree: Tree, folder: str | None) -> Outcome:
    process = RowProcess(row, tree, folder=folder)
    try:
        while (outcome := process.outcome()) is None:
            process.watch()
            time.sleep(POLL_S)
        return outcome
    finally:
        process.kill()


def _write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# --- the client -------------------------------------------------------------------------------------------------------


def run(rows: Sequence[Row], tree: Tree, scheduler: str, *, retries: int = 1, log: Callable[[str], None] = print,
        warn: Callable[[str], None] | None = None, up_to_date: Callable[[Row], bool] = lambda row: False) -> list[str]:
    """Run rows on the cluster of ``scheduler`` and return the names of failed rows.

    Parameters
    ----------
    retries : number of further attempts after the process of a row died although its worker did not
    warn : function that prints failures; by default ``log``
    up_to_date : predicate evaluated just before a row starts; rows with True are skipped

    Raises
    ------
    SystemExit
        if no scheduler answers at the address.
    """
    try:
        client = Client(scheduler, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"no scheduler at {scheduler}: {error}") from None
    with client:
        running = _Run(rows, tree, client, retries, log, up_to_date)
        running.waiting.progress.warn = warn or log
        return running.all()


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
        """Lock a row in this tree and send it to the cluster, unless another process runs it or it is up to date."""
        lock = ExitStack()
        try:
            lock.enter_context(_locks.lock(self.tree.lock(row), wait=False))
        except _locks.Held as who:
            self.waiting.defer(row, str(who))
            return
        except OSError as error:  # for example a full disk
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
        self.tries[row.name] += 1  # else Dask would return the earlier result
        digest = _files.digest(json.dumps([job, self.tries[row.name]], sort_keys=True))
        future = self.client.submit(work, job, key=f"{row.name}-{digest}", resources=dict(row.resources) or None)
        self.sent[future] = (row, lock, made, time.monotonic())
        if missed := self._missed(row):
            self.waiting.log(f"{row.name}: waits for a worker with {missed}; none has that much now. "
                             f"Start one with: dask worker ... --resources {missed.replace(', ', ' ')}")

    def _missed(self, row: Row) -> str:
        """Return the resources of a row that no worker offers yet, as ``GPU=2``; workers may join later."""
        workers = [worker["resources"] for worker in self.client.scheduler_info()["workers"].values()]
        enough = any(all(there.get(name, 0) >= amount for name, amount in row.resources.items()) for there in workers)
        return "" if enough else ", ".join(f"{name}={amount:g}" for name, amount in row.resources.items())

    def _collect(self, future: Future) -> None:
        row, lock, made, began = self.sent.pop(future)
        outcome, texts = self._outcome(row, future)
        try:
            if outcome.kind == "done":
                execution.publish(row, self.tree, texts["page"], texts.get("record"), made)
            elif "partial" in texts:
                kept = self.tree.failed / f"{row.name}.ipynb"
                _write({kept: texts["partial"]})
                why = outcome.message.splitlines()[0]
                outcome = Outcome(outcome.kind, f"{why}\nthe partial page is {kept}; published pages and records are "
                                                f"as they were")
        except OSError as error:
            outcome = Outcome("failed", f"row {row.name} failed: {error}")
        if self.waiting.should_retry(row, outcome):
            self._send(row, lock)
        else:
            self._finished(row, lock, outcome, (time.monotonic() - began) / 60)

    def _outcome(self, row: Row, future: Future) -> tuple[Outcome, dict[str, str]]:
        """Return the outcome of a task and the texts that it returned."""
        if future.status == "finished":
            texts = future.result()
            return Outcome(texts.pop("kind"), texts.pop("message")), texts
        if future.status == "error":
            return Outcome("failed", f"row {row.name} failed: {_in_words(future.exception())}"), {}
        return Outcome("failed", f"row {row.name} was given up: the cluster is gone ({future.status})"), {}

    def _finished(self, row: Row, lock: ExitStack, outcome: Outcome, minutes: float = 0) -> None:
        lock.close()
        self.waiting.progress.finished(row, outcome, minutes)


def _in_words(error: BaseException) -> str:
    """Return the reason of a failure outside of the row; scheduler and worker both deserialise tasks."""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError) or "deserializ" in why:
        return f"scheduler and workers need pruning_lib too, in the same version as here ({why[:200]})"
    return why
