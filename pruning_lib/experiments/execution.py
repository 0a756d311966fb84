"""Execution of one row of runs.yml: a notebook becomes an executed page and a record.

Every run is one row: a notebook and the parameters that differ from its defaults.  Page and record of a row are
published together after a complete run; a failed run changes no published file.  A lock prevents two processes from
running the same row.  Parallel execution is in ``local`` and ``dask_cluster``, detection of outdated pages in
``staleness``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pruning_lib import _locks
from pruning_lib._extras import extra
from pruning_lib._files import replacing
from pruning_lib.experiments import records as results
from pruning_lib.experiments.runs import Row, Tree, checked, parameters_of, source
from pruning_lib.experiments.staleness import provenance

with extra("report"):
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config


class RowFailed(Exception):
    """Failure of a row; the message has the reason and, if there is one, the path of the partial page."""


class WorkerDied(RowFailed):
    """Death of the process of a row; running it again may help."""


def run(row: Row, tree: Tree, *, log: Callable[[str], None] = print, wait: bool = True,
        done: Callable[[], bool] = lambda: False) -> Path:
    """Execute one row; its page and record replace the published ones only on success.

    Parameters
    ----------
    wait : True to wait for another process that runs this row and then run it again; False to raise ``_locks.Held``
    done : predicate evaluated under the lock of the row; True skips the run

    Raises
    ------
    RowFailed
        with the failed cell; the partial page is kept in ``tree.failed``.
    """
    checked(row, tree)
    with _locks.lock(tree.lock(row), wait=wait, log=lambda who: log(f"{row.name}: waiting for {who}, which runs it")):
        if done():
            return tree.page(row)
        work = tree.work(row)
        shutil.rmtree(work, ignore_errors=True)  # left by a killed run
        work.mkdir(parents=True)
        try:
            _make(row, tree, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        (tree.failed / f"{row.name}.ipynb").unlink(missing_ok=True)
    return tree.page(row)


def publish(row: Row, tree: Tree, page: str, record: str | None, made: Mapping[str, Any]) -> None:
    """Publish a page and a record of another machine; the caller must hold the row's lock.

    Parameters
    ----------
    made : provenance of the page in this tree, from ``staleness.provenance``
    """
    work = tree.work(row)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        notebook = nbformat.reads(page, as_version=4)
        notebook.metadata["pruning_lib"].update(made)
        finished = {work / f"{row.name}.ipynb": tree.pages}
        if record is not None:
            path = work / f"{row.name}.json"
            path.write_text(record)
            notebook.metadata["pruning_lib"]["record"] = results.contents(path).get("checksum")
            finished = {path: tree.records, **finished}
        nbformat.write(notebook, work / f"{row.name}.ipynb")
        _publish(finished)
        (tree.failed / f"{row.name}.ipynb").unlink(missing_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sweep(row: Row, tree: Tree) -> None:
    """Delete the unfinished files of a killed run, unless another process runs the row."""
    with suppress(_locks.Held, OSError):  # OSError: a full disk prevents the lock
        with _locks.lock(tree.lock(row), wait=False):
            shutil.rmtree(tree.work(row), ignore_errors=True)


def _make(row: Row, tree: Tree, work: Path) -> None:
    """Execute a row in the folder ``work`` and publish its page and record."""
    made = provenance(row, tree)
    page = work / f"{row.name}.ipynb"
    records = tree.records if row.reading else work / "results"
    parameters = {**parameters_of(source(row, tree)), **row.parameters}
    with _environment(PRUNING_RUN=row.name, PRUNING_PARAMETERS=json.dumps(parameters),
                      PRUNING_RESULTS=str(records.resolve()), PRUNING_RECORDS=str(tree.records.resolve())):
        _execute(row, tree, page)
    record = work / "results" / f"{row.name}.json"
    if not row.reading and not record.is_file():
        raise RowFailed(f"row {row.name}: {row.notebook} wrote no record; end a run with records.write(...), "
                        f"or mark a notebook that only reads records with 'reading: true' in runs.yml")
    if not row.reading:
        made["record"] = results.contents(record).get("checksum")
    nbformat.write(_cleaned(nbformat.read(page, as_version=4), row, made), page)
    _publish({page: tree.pages} if row.reading else {record: tree.records, page: tree.pages})


def _execute(row: Row, tree: Tree, page: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
            papermill.execute_notebook(
                str(source(row, tree)), str(page), parameters=dict(row.parameters), kernel_name="python3",
                stderr_file=sys.stderr, progress_bar={"desc": row.name}, config=_reached_through(sockets),
            )  # runs in the current folder, because parameters may be relative paths
    except (PapermillExecutionError, RuntimeError) as error:
        if not isinstance(error, (PapermillExecutionError, DeadKernelError)) and "ernel died" not in str(error):
            raise  # a kernel that dies while it starts is a plain RuntimeError
        kept = tree.failed / f"{row.name}.ipynb"
        shutil.copyfile(page, kept)
        kind: type[RowFailed] = WorkerDied
        why = "because its kernel died, most often for want of memory"
        if isinstance(error, PapermillExecutionError):
            kind = RowFailed
            why = f"in cell {error.cell_index}: {error.ename}: {error.evalue}"
        raise kind(f"row {row.name} failed {why}\n"
                   f"the partial page is {kept}; published pages and records are as they were") from error


def _reached_through(folder: str) -> Config:
    """Return a configuration with sockets in ``folder``; two kernels that start at once may take the same TCP port."""
    files = os.name == "posix" and len(folder) < 90  # the path of a socket has at most 107 bytes
    return Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/at"}} if files else {})


def _cleaned(notebook: Any, row: Row, made: Mapping[str, Any]) -> Any:
    """Return the page without progress bars, paths of this machine, and times that change with every run."""
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell.outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"] if "outputs" in cell else []
        if cell.cell_type != "code":
            cell.pop("outputs")
    kept = {**made, "row": row.name, "notebook": row.notebook, "parameters": dict(row.parameters)}
    notebook.metadata["pruning_lib"] = kept
    notebook.metadata.pop("papermill", None)
    return notebook


def _publish(finished: Mapping[Path, Path]) -> None:
    """Publish finished files (file -> folder): copy all next to their targets, then rename them."""
    with ExitStack() as stack:
        for path, folder in reversed(list(finished.items())):  # the stack replaces in the opposite order
            shutil.copyfile(path, stack.enter_context(replacing(folder / path.name)))


class _environment:
    """Environment variables for the duration of a ``with`` block."""

    def __init__(self, **variables: str) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
