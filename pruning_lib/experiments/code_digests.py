"""What code a notebook reaches: a digest of every definition of this package that its imports lead to.

Read from the syntax trees, without docstrings, comments and layout, so that only what the code does counts.  Names lead
from definition to definition; what is entered in a table under a name belongs to the table.
"""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent
ALWAYS = "<module>"  # statements that belong to no name
Place = tuple[str, str]  # module, name in it; "*" for all of it


def digests(cells: Iterable[str], package: Path = PACKAGE) -> dict[str, str]:
    """``"module.name"`` -> 8 hex digits, for every definition that the code cells lead to."""
    notebook = _Module("", "\n".join(filter(None, map(_python, cells))), package)
    todo = [place for statement in notebook.tree.body for place in notebook.leads_to(statement)]
    found: dict[str, str] = {}
    seen: set[Place] = set()
    while todo:
        place = todo.pop()
        if place not in seen:
            seen.add(place)
            todo += _visit(place, package, found)
    return dict(sorted(found.items()))


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names whose code is another now or gone; what came since cannot have been used then, but through these."""
    return sorted(name for name, digest in before.items() if now.get(name) != digest)


def _visit(place: Place, package: Path, found: dict[str, str]) -> Iterator[Place]:
    """Enter the digests of one definition; gives the places it leads to."""
    stem, name = place
    module = _module(package / f"{stem}.py")
    if name not in module.parts and name in module.imports:  # it only passes through
        yield module.imports[name]
    for wanted in [*module.parts] if name == "*" else [ALWAYS, name]:
        for key, statement in module.parts.get(wanted, ()):
            found[f"{stem}.{key}"] = hashlib.sha256(ast.unparse(statement).encode()).hexdigest()[:8]
            yield from module.leads_to(statement)


class _Module:
    """The top level of one file: which statements belong to which name, and what its imports mean."""

    def __init__(self, stem: str, text: str, package: Path) -> None:
        self.stem, self.package, self.tree = stem, package, _without_docstrings(ast.parse(text))
        self.parts: dict[str, list[tuple[str, ast.stmt]]] = defaultdict(list)
        self.imports: dict[str, Place] = {}
        self.dotted: list[Place] = []  # of "import package.module", which is then used as package.module.name
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imports.update(_imports(node, package))
                self.dotted += [place for name, place in _imports(node, package) if name == package.name]
        for statement in self.tree.body:
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                for owner, key in _owners(statement):
                    self.parts[owner].append((key, statement))

    def leads_to(self, statement: ast.AST) -> Iterator[Place]:
        """Definitions of the package that a statement names; a module that is handed on counts as a whole."""
        inner = set()
        for node in ast.walk(statement):
            if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                    and node.value.id != self.package.name):
                stem, name = self.imports.get(node.value.id, ("", ""))
                if name == "*":
                    inner.add(node.value)
                    yield stem, node.attr
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node not in inner:
                if node.id == self.package.name:
                    yield from self.dotted
                elif node.id in self.imports:
                    yield self.imports[node.id]
                if self.stem and node.id in self.parts:
                    yield self.stem, node.id


@lru_cache(maxsize=256)
def _read(path: Path, changed_ns: int) -> _Module:
    return _Module(path.stem, path.read_text(), path.parent)


def _module(path: Path) -> _Module:
    return _read(path, path.stat().st_mtime_ns)


def _imports(node: ast.Import | ast.ImportFrom, package: Path) -> Iterator[tuple[str, Place]]:
    """(name here, place) of what an import brings in from the package."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            path = alias.name.split(".")
            if path[0] == package.name and len(path) > 1:
                yield alias.asname or path[0], (path[1], "*")
            continue
        origin = ".".join(filter(None, [package.name if node.level else "", node.module]))
        if origin == package.name and (package / f"{alias.name}.py").is_file():
            yield alias.asname or alias.name, (alias.name, "*")
        elif origin.startswith(f"{package.name}."):
            yield alias.asname or alias.name, (origin.split(".")[1], alias.name)


def _owners(statement: ast.stmt) -> list[tuple[str, str]]:
    """(name, key) of the names a statement defines or adds to."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        tables = [_root(decorator) for decorator in statement.decorator_list]
        return [(statement.name, statement.name), *((t, f"{t}[{statement.name}]") for t in tables if t)]
    stored = [node for node in ast.walk(statement) if isinstance(getattr(node, "ctx", None), ast.Store)
              and isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))]
    return [(_root(node), ast.unparse(node)) for node in stored if _root(node)] or [(ALWAYS, ast.unparse(statement))]


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                    first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _python(cell: str) -> str:
    """A cell without IPython's own lines; empty when the rest is no Python."""
    text = "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    return text
