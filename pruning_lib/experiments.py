"""Rows of runs.yml -> executed pages and records.

Every run is one row: a notebook and the parameters it departs from the defaults with.  The page and the record of a row
appear together, when all of it is done; a failed run leaves what was published as it was.
Order of this file: the tree · rows · checks · staleness · running.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError


@dataclass(frozen=True)
class Tree:
    """Where notebooks, pages and records are."""

    notebooks: Path
    pages: Path
    records: Path
    failed: Path

    @classmethod
    def at(cls, root: Path, out: Path | None = None) -> Tree:
        """The tree of the repository at ``root``; pages and records go under ``out`` if given."""
        if not (root / "notebooks" / "runs.yml").is_file():
            raise SystemExit(f"{root} has no notebooks/runs.yml; call from the repository, or give --root")
        if out:
            return cls(root / "notebooks", out / "executed", out / "results", out / "failed")
        return cls(root / "notebooks", root / "book" / "executed", root / "data" / "results", root / "build" / "failed")


@dataclass(frozen=True)
class Row:
    """One page of the report."""

    name: str
    notebook: str
    parameters: Mapping[str, Any]
    reading: bool = False


class RowFailed(Exception):
    """A notebook raised; the message says in which cell and where the partial page is."""


def rows(tree: Tree) -> dict[str, Row]:
    """The rows of runs.yml in order, each checked against its notebook.

    Raises
    ------
    SystemExit
        naming the row and what is wrong with it.
    """
    table = yaml.safe_load((tree.notebooks / "runs.yml").read_text()) or {}
    found = {}
    for name, entry in table.items():
        unknown = set(entry or {}) - {"notebook", "parameters", "reading"}
        if unknown or "notebook" not in (entry or {}):
            raise SystemExit(f"runs.yml, row {name}: wanted notebook, parameters, reading; got {sorted(entry or {})}")
        row = Row(name, entry["notebook"], entry.get("parameters") or {}, bool(entry.get("reading")))
        found[name] = checked(row, tree)
    return found


def defaults(tree: Tree) -> dict[str, Row]:
    """One row per notebook at its default parameters, runs first, then readings; the row is called as the notebook."""
    table = rows(tree)
    names = dict.fromkeys((row.reading, row.notebook) for row in table.values())
    return {name: Row(name, name, {}, reading) for reading, name in sorted(names, key=lambda pair: pair[0])}


def source(row: Row, tree: Tree) -> Path:
    """The notebook of a row."""
    path = tree.notebooks / f"{row.notebook}.ipynb"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in tree.notebooks.glob("*.ipynb")))
        raise SystemExit(f"row {row.name}: no notebook {row.notebook!r}; there are: {known}")
    return path


def checked(row: Row, tree: Tree) -> Row:
    """``row``, after its parameters were compared with those of the notebook: names known, types the same."""
    known = parameters_of(source(row, tree))
    for name, value in row.parameters.items():
        if name not in known:
            raise SystemExit(f"row {row.name}: {row.notebook} has no parameter {name!r}; it has: {', '.join(known)}")
        wanted = type(known[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise SystemExit(f"row {row.name}: parameter {name} takes {wanted.__name__} like {known[name]!r}, "
                             f"got {value!r}")
    return row


def parameters_of(path: Path) -> dict[str, Any]:
    """Name -> default of every parameter of a notebook; all are literals."""
    inspected = papermill.inspect_notebook(str(path))
    return {name: ast.literal_eval(entry["default"]) for name, entry in inspected.items()}


def fingerprint(row: Row, tree: Tree) -> str:
    """Changes when the notebook's cells, the row's parameters or, for a reading, any record changes."""
    notebook = nbformat.read(source(row, tree), as_version=4)
    parts = [cell.source for cell in notebook.cells] + [json.dumps(dict(row.parameters), sort_keys=True)]
    if row.reading:
        parts += [path.read_text() for path in sorted(tree.records.glob("*.json"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def why_stale(row: Row, tree: Tree) -> str:
    """Why the row has to run again; empty when its page is up to date."""
    page = tree.pages / f"{row.name}.ipynb"
    if not page.is_file():
        return "no page yet"
    if not row.reading and not (tree.records / f"{row.name}.json").is_file():
        return "no record"
    made_from = nbformat.read(page, as_version=4).metadata.get("pruning_lib", {}).get("fingerprint")
    if made_from != fingerprint(row, tree):
        return "notebook or a record changed" if row.reading else "notebook or parameters changed"
    return ""


def run(row: Row, tree: Tree, *, say: Callable[[str], None] = print) -> Path:
    """Execute one row; its page and record replace the published ones only when all went well.

    Raises
    ------
    RowFailed
        with the cell that failed; the partial page is kept aside in ``tree.failed``.
    """
    checked(row, tree)
    made_from = fingerprint(row, tree)
    tree.failed.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{row.name}-", dir=tree.failed) as work:
        page = Path(work) / f"{row.name}.ipynb"
        results = tree.records if row.reading else Path(work) / "results"
        with _environment(PRUNING_RUN=row.name, PRUNING_RESULTS=str(results.resolve()),
                          PRUNING_RECORDS=str(tree.records.resolve())):
            _execute(row, tree, page)
        notebook = _cleaned(nbformat.read(page, as_version=4), row, made_from)
        nbformat.write(notebook, page)
        record = Path(work) / "results" / f"{row.name}.json"
        if not row.reading and not record.is_file():
            raise RowFailed(f"row {row.name}: {row.notebook} wrote no record; a run ends with results.write(...), "
                            f"a notebook that only reads records is marked 'reading: true' in runs.yml")
        _publish({page: tree.pages} if row.reading else {record: tree.records, page: tree.pages})
    (tree.failed / f"{row.name}.ipynb").unlink(missing_ok=True)
    say(f"{row.name}: done")
    return tree.pages / f"{row.name}.ipynb"


def _execute(row: Row, tree: Tree, page: Path) -> None:
    try:
        papermill.execute_notebook(
            str(source(row, tree)), str(page), parameters=dict(row.parameters), kernel_name="python3",
            stderr_file=sys.stderr, progress_bar={"desc": row.name},  # in the current folder: parameters may be paths
        )
    except (PapermillExecutionError, DeadKernelError) as error:
        kept = tree.failed / f"{row.name}.ipynb"
        shutil.copyfile(page, kept)
        why = "because its kernel died, most often for want of memory"
        if isinstance(error, PapermillExecutionError):
            why = f"in cell {error.cell_index}: {error.ename}: {error.evalue}"
        raise RowFailed(f"row {row.name} failed {why}\n"
                        f"the partial page is {kept}; published pages and records are as they were") from error


def _cleaned(notebook: Any, row: Row, made_from: str) -> Any:
    """The page without progress bars, paths of this machine and times that change with every run."""
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell.outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"] if "outputs" in cell else []
        if cell.cell_type != "code":
            cell.pop("outputs")
    kept = {"fingerprint": made_from, "row": row.name, "notebook": row.notebook, "parameters": dict(row.parameters)}
    notebook.metadata["pruning_lib"] = kept
    notebook.metadata.pop("papermill", None)
    return notebook


def _publish(finished: Mapping[Path, Path]) -> None:
    """Move finished files (file -> folder) to their places; all are beside their places before the first one moves."""
    beside = {folder / f".{path.name}.part": (path, folder) for path, folder in finished.items()}
    try:
        for part, (path, folder) in beside.items():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part)
        for part, (path, folder) in beside.items():
            part.replace(folder / path.name)
    finally:
        for part in beside:
            part.unlink(missing_ok=True)


class _environment:
    """Environment variables for the time of a block."""

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


def build_book(root: Path, out: Path | None = None) -> Path:
    """Render the book, every warning an error; returns its index page.

    Without ``out`` the published report is rendered into ``build/report``.  With ``out`` the book is rendered from the
    pages found there, the chapters stay the same; a reading that is not there is the published one.

    Raises
    ------
    SystemExit
        when the builder complains.
    """
    tree = Tree.at(root, out)
    if not tree.pages.is_dir():
        raise SystemExit(f"no pages in {tree.pages}; make them with: pruning-lib run")
    book = (out or root / "build" / "report") / "book"
    shutil.rmtree(book, ignore_errors=True)
    shutil.copytree(root / "book", book, ignore=shutil.ignore_patterns("executed", "_build"))
    shutil.copytree(tree.pages, book / "executed")
    for row in rows(tree).values():  # chapters quote readings; one that was not made anew is the published one
        page = Tree.at(root).pages / f"{row.name}.ipynb"
        if row.reading and page.is_file() and not (book / "executed" / page.name).exists():
            shutil.copyfile(page, book / "executed" / page.name)
    shutil.copytree(root / "pruning_lib", book.parent / "pruning_lib", dirs_exist_ok=True)  # chapters quote the code
    contents = yaml.safe_load((book / "_toc.yml").read_text())
    runs = (defaults(tree) if out else rows(tree)).values()
    pages = [row.name for row in runs if not row.reading and (tree.pages / f"{row.name}.ipynb").is_file()]
    contents["parts"][-1]["chapters"] = [{"file": f"executed/{name}", "title": name} for name in pages]
    (book / "_toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False))
    builder = Path(sys.executable).with_name("jupyter-book")
    command = [str(builder), "build", str(book), "-n", "-W", "--keep-going", "-q"]
    if subprocess.run(command, env={**os.environ, "PRUNING_RESULTS": str(tree.records.resolve())}).returncode:
        raise SystemExit(f"the book was not built cleanly; see the messages above. Sources: {book}")
    return book / "_build" / "html" / "index.html"
