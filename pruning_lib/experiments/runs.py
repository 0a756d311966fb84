"""Rows of runs.yml, and the paths of their notebooks, pages and records.

Order of this file: tree · rows · checks.  This module executes nothing.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra

with extra("report"):
    import nbformat
    import papermill
    import yaml

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"  # also the name of a file, so never a path
KEYS = ("notebook", "parameters", "reading", "resources", "memory_gb", "not_run")


@dataclass(frozen=True)
class Tree:
    """Folders of notebooks, pages and records."""

    notebooks: Path
    pages: Path
    records: Path
    failed: Path

    @classmethod
    def at(cls, root: Path, out: Path | None = None) -> Tree:
        """Return the tree of the repository at ``root``, with pages and records in ``out`` if given."""
        if not (root / "notebooks" / "runs.yml").is_file():
            raise SystemExit(f"{root} has no notebooks/runs.yml; call from the repository, or give --root; an "
                             f"installed package lays one out with: pruning-lib init DIR")
        if out:
            return cls(root / "notebooks", out / "executed", out / "results", out / "failed")
        return cls(root / "notebooks", root / "book" / "executed", root / "data" / "results", root / "build" / "failed")

    def page(self, row: Row) -> Path:
        return self.pages / f"{row.name}.ipynb"

    def published_ns(self, row: Row) -> int:
        """Return the modification time of the row's page in ns; 0 without a page."""
        return self.page(row).stat().st_mtime_ns if self.page(row).exists() else 0

    def record(self, row: Row) -> Path:
        return self.records / f"{row.name}.json"

    def work(self, row: Row) -> Path:
        """Return the folder of incomplete pages and records."""
        return self.failed / f".{row.name}.work"

    def lock(self, row: Row) -> Path:
        """Return the path of the lock of a running row."""
        return self.failed / f".{row.name}.lock"


@dataclass(frozen=True)
class Row:
    """One page of the report.

    Attributes
    ----------
    resources : name -> required amount of a scarce resource, e.g. ``{"GPU": 1}``
    memory_gb : memory limit of its notebook in GB; 0 for no limit
    not_run : reason for a missing page, e.g. required hardware; such a row runs only if named explicitly
    """

    name: str
    notebook: str
    parameters: Mapping[str, Any]
    reading: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    memory_gb: float = 0
    not_run: str = ""


def rows(tree: Tree) -> dict[str, Row]:
    """Return the rows of runs.yml in order, each checked against its notebook.

    Raises
    ------
    SystemExit
        for an invalid row; the message names the row and the fault.
    """
    return {name: checked(_row(name, entry), tree) for name, entry in _table(tree.notebooks / "runs.yml").items()}


def _table(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not text, or an invalid date
        raise SystemExit(f"{path} is not valid YAML: {error}") from None
    if not isinstance(table, dict):
        raise SystemExit(f"{path} needs one entry per row: a name, then notebook and parameters; "
                         f"got a {type(table).__name__}")
    return table


def _row(name: Any, entry: Any) -> Row:
    """Return a row of runs.yml after a check of its form."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise SystemExit(f"runs.yml, row {name!r}: use letters, digits, dot, dash and underscore in a name")
    entry = entry or {}
    if not isinstance(entry, dict) or set(entry) - set(KEYS) or "notebook" not in entry:
        got = sorted(map(str, entry)) if isinstance(entry, dict) else entry
        raise SystemExit(f"runs.yml, row {name}: wanted notebook, parameters, reading; got {got} "
                         f"(resources, memory_gb and not_run may be added)")
    row = Row(name, entry["notebook"], entry.get("parameters") or {}, entry.get("reading") or False,
              entry.get("resources") or {}, entry.get("memory_gb") or 0, entry.get("not_run") or "")
    forms = {"notebook": (row.notebook, str, "a name"), "parameters": (row.parameters, dict, "names with values"),
             "reading": (row.reading, bool, "true or false"), "resources": (row.resources, dict, "e.g. {GPU: 1}"),
             "not_run": (row.not_run, str, "a text that says why")}
    for key, (value, kind, wanted) in forms.items():
        if not isinstance(value, kind):
            raise SystemExit(f"runs.yml, row {name}: {key} is {value!r}, wanted {wanted}")
    amounts = {**row.resources, "memory_gb": row.memory_gb}
    wrong = {k: v for k, v in amounts.items() if not (_is_number(v) and 0 <= v < 1e6) or not isinstance(k, str)}
    if wrong:
        raise SystemExit(f"runs.yml, row {name}: {wrong}; resources and memory_gb are numbers of at least 0")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def defaults(tree: Tree) -> dict[str, Row]:
    """Return one row per notebook with default parameters and the name of the notebook, runs before readings."""
    table = rows(tree)
    names = dict.fromkeys((row.reading, row.notebook) for row in table.values())
    return {name: Row(name, name, {}, reading) for reading, name in sorted(names, key=lambda pair: pair[0])}


def source(row: Row, tree: Tree) -> Path:
    """Return the path of a row's notebook; raise SystemExit for a path outside of the folder of notebooks."""
    path = tree.notebooks / f"{row.notebook}.ipynb"
    if not re.fullmatch(NAME, row.notebook) or not path.is_file() or path.resolve().parent != tree.notebooks.resolve():
        known = ", ".join(sorted(p.stem for p in tree.notebooks.glob("*.ipynb")))
        raise SystemExit(f"row {row.name}: no notebook {row.notebook!r}; available: {known}")
    return path


def checked(row: Row, tree: Tree) -> Row:
    """Return ``row`` after a check of its parameters: names and types must match those of the notebook."""
    known, words_for = parameters_of(source(row, tree)), words_of(source(row, tree))
    for name, value in row.parameters.items():
        if name not in known:
            raise SystemExit(f"row {row.name}: {row.notebook} has no parameter {name!r}; it has: {', '.join(known)}")
        words = words_for.get(name, ())
        if not _fits(value, known[name], words):
            wanted = " or ".join(["an int", *map(repr, words)] if words else
                                 [f"{type(known[name]).__name__} like {known[name]!r}"])
            raise SystemExit(f"row {row.name}: parameter {name} takes {wanted}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SystemExit(f"row {row.name}: parameter {name} is {value!r}; give a finite number")
    return row


def _fits(value: Any, default: Any, words: Collection[str]) -> bool:
    """Return True if a parameter takes ``value``: one of its words or an int, else a value of its default's type."""
    if words:
        return type(value) is int or value in words
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def words_of(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the words that parameters of a notebook take besides an int, as their comments state.

    The comment of such a parameter begins with ``int or`` and the words in quotes, then a colon, as in
    ``tokens = 512  # int or "all": how many tokens``.
    """
    helps = {name: entry["help"] or "" for name, entry in _inspected(path, path.stat().st_mtime_ns).items()}
    return {name: tuple(re.findall(r'"(\w+)"', help.partition(":")[0])) for name, help in helps.items()
            if re.match(r'int or "\w+"', help)}


def parameters_of(path: Path) -> dict[str, Any]:
    """Return name -> default of every parameter of a notebook, all literals, without running it."""
    try:
        inspected = _inspected(path, path.stat().st_mtime_ns)
        return {name: ast.literal_eval(entry["default"]) for name, entry in inspected.items()}
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        raise SystemExit(f"{path.name}: its parameters cannot be read ({error}); write each as a literal, one per line"
                         ) from None


@lru_cache(maxsize=256)
def _inspected(path: Path, modified_ns: int) -> dict[str, Any]:
    """Return name -> default, type and comment of every parameter of a notebook, as texts; read again once modified."""
    return dict(papermill.inspect_notebook(str(path)))
