"""Digests of the code that a notebook uses: one for every definition of this package reachable from its imports.

References lead from definition to definition; an entry of a table belongs to the table.  A digest is computed from the
syntax tree in a canonical form, so that it depends only on code that can change a number.  Docstrings, comments,
layout, type annotations, the text of error messages and import aliases do not count.  If code uses a table as a whole
(in a loop, for example), the names of its entries are part of the digests, because a new entry changes the result.
Order of this file: digests · canonical form.  Syntax trees are in ``source_modules``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path

from pruning_lib import _files
from pruning_lib.experiments.source_modules import (
    ALWAYS,
    ENTRIES,
    NOTEBOOK,
    Place,
    SourceModule,
    followed,
    source_module,
)

PACKAGE = Path(__file__).resolve().parents[1]
WORD, TEXT = "*.", "="  # in a map of names: before an attribute, argument or variable; before a text
_digest = partial(_files.digest, digits=8)


def digests(cells: Iterable[str], package: Path = PACKAGE, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``"module.name"`` -> 8 hex digits for the cells and every definition that they use.

    Parameters
    ----------
    cells : code cells of a notebook
    package : folder of the package whose definitions are followed
    names : today's names of modules (``"module"``), definitions (``"module.name"``), and attributes, arguments or
        variables (``"*.name"``), and texts (``"=text"``) that were renamed; with them the code of an earlier version
        has the digests of today's where nothing but names changed
    """
    renamed = tuple(sorted((names or {}).items()))
    return dict(_digests(tuple(cells), package, renamed, _stamp(package)))


def of_notebook(cells: Iterable[str], package: Path = PACKAGE, names: Mapping[str, str] | None = None) -> str:
    """Return the digest of the code in the cells alone."""
    return _of_cells(_notebook(cells, package), dict(names or {}))


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return names whose code changed or vanished.

    A new definition counts only through the code that uses it: its caller, or its table.
    """
    return sorted(name for name, digest in before.items() if now.get(name) != digest)


def name_today(name: str, names: Mapping[str, str]) -> str:
    """Return today's name of a definition, or of an entry of a table, as in the keys of ``digests``."""
    base, bracket, entry = name.partition("[")
    return _renamed(base, names) + bracket + entry


def _notebook(cells: Iterable[str], package: Path) -> SourceModule:
    return SourceModule(NOTEBOOK, "\n".join(filter(None, map(_python, cells))), package)


def _of_cells(notebook: SourceModule, renamed: Mapping[str, str]) -> str:
    return _digest("\n".join(_canonical(notebook, statement, renamed) for statement in notebook.tree.body
                             if not isinstance(statement, (ast.Import, ast.ImportFrom))))


def _stamp(package: Path) -> int:
    """Return a number that changes with any file of the package."""
    return hash(tuple((str(path), path.stat().st_mtime_ns) for path in sorted(package.rglob("*.py"))))


@lru_cache(maxsize=256)
def _digests(cells: tuple[str, ...], package: Path, names: tuple[tuple[str, str], ...], stamp: int) -> dict[str, str]:
    renamed, notebook = dict(names), _notebook(cells, package)
    found = {NOTEBOOK: _of_cells(notebook, renamed)}
    todo = [place for statement in notebook.tree.body for place in notebook.leads_to(statement)]
    seen: set[Place] = set()
    while todo:
        place = todo.pop()
        if place not in seen:
            seen.add(place)
            todo += _visit(place, package, found, renamed)
    return dict(sorted(found.items()))


def _visit(place: Place, package: Path, found: dict[str, str], renamed: Mapping[str, str]) -> Iterator[Place]:
    """Enter the digests of one definition; yield the places that it refers to."""
    dotted, name = place
    module = source_module(dotted, package)
    if name == ENTRIES:
        return
    if name.endswith(ENTRIES):
        keys = sorted(key for key, _ in module.parts[name.removesuffix(ENTRIES)])
        found[_renamed(f"{dotted}.{name.removesuffix(ENTRIES)}", renamed) + ENTRIES] = _digest("\n".join(keys))
        return
    if name not in module.parts and name in module.imports:  # a re-exported name
        yield module.imports[name]
    for wanted in [*module.parts] if name == "*" else [ALWAYS, name]:
        for key, statement in module.parts.get(wanted, ()):
            at = _renamed(f"{dotted}.{wanted}", renamed) if wanted != ALWAYS else _renamed(dotted, renamed) + "."
            found[at + key.removeprefix(wanted)] = _digest(_canonical(module, statement, renamed))
            yield from module.leads_to(statement)


def _python(cell: str) -> str:
    """Return a cell without IPython's own lines; empty if the rest is not valid Python."""
    text = "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    return text


# --- canonical form ---------------------------------------------------------------------------------------------------


def _canonical(module: SourceModule, statement: ast.stmt, renamed: Mapping[str, str]) -> str:
    """Return the text of a statement in canonical form."""
    copy = ast.parse(ast.unparse(statement)).body[0]
    return ast.unparse(ast.fix_missing_locations(_Canonical(module, renamed).visit(copy)))


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    """Return today's name of a place of the package: by its own entry, else by that of its module, else by word."""
    if name in renamed:
        return renamed[name]
    head, dot, last = name.rpartition(".")
    return f"{_renamed(head, renamed)}.{renamed.get(WORD + last, last)}" if dot else name


class _Canonical(ast.NodeTransformer):
    """Transformer to canonical form: full names for the package, no annotations, no text of errors."""

    def __init__(self, module: SourceModule, renamed: Mapping[str, str]) -> None:
        self.module, self.renamed = module, renamed

    def _in_full(self, place: Place) -> ast.Name:
        dotted, name = followed(place, self.module.package)
        return ast.Name(_renamed(dotted if name == "*" else f"{dotted}.{name}", self.renamed), ast.Load())

    def _word(self, word: str) -> str:
        return self.renamed.get(WORD + word, word)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        place = self.module.resolved(node)
        if place is not None and place[1] != "*":
            return self._in_full(place)
        node.attr = self._word(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.module.imports:
            return self._in_full(self.module.imports[node.id])
        if self.module.dotted != NOTEBOOK and node.id in self.module.parts:
            return self._in_full((self.module.dotted, node.id))
        return ast.Name(self._word(node.id), node.ctx)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        node.arg = node.arg and self._word(node.arg)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            node.value = self.renamed.get(TEXT + node.value, node.value)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._word(node.arg))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        for inner in ast.walk(node):
            for field, value in ast.iter_fields(inner):
                if isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant)
                                                        and isinstance(value.value, str)):
                    setattr(inner, field, ast.Constant(""))
                elif isinstance(value, list):
                    setattr(inner, field, [ast.Constant("") if isinstance(v, ast.JoinedStr) or (
                        isinstance(v, ast.Constant) and isinstance(v.value, str)) else v for v in value])
        return self.generic_visit(node)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.AST:
        own = f"{self.module.dotted}.{node.name}"
        node.name = _renamed(own, self.renamed) if node.name in self.module.parts else self._word(node.name)
        if not isinstance(node, ast.ClassDef):
            node.returns = None
        return self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _definition
