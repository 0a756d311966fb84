"""Source files of the package as syntax trees: definitions of each module, and meanings of its imports.

Order of this file: one module · tables · files · imports and owners of statements.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ALWAYS = "<module>"  # statements that belong to no name
NOTEBOOK = "<notebook>"
ENTRIES = "[*]"  # suffix of the place of all names in a table
BY_KEY = ("get", "register", "facts")  # attributes of a table that access one entry
Place = tuple[str, str]  # dotted module inside the package, name in it; "*" for all of it


class SourceModule:
    """The top level of one file: the statements of every name, and the targets of its imports."""

    def __init__(self, dotted: str, text: str, package: Path) -> None:
        self.dotted, self.package, self.tree = dotted, package, _without_docstrings(ast.parse(text))
        self.parts: dict[str, list[tuple[str, ast.stmt]]] = defaultdict(list)
        self.imports: dict[str, Place] = {}
        self.whole: list[Place] = []  # targets of "import package.module", used as package.module.name
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name, place in _imports(node, package, dotted):
                    self.imports[name] = place
                    self.whole += [place] if name == package.name and place[0] else []
        for statement in self.tree.body:
            if not isinstance(statement, (ast.Import, ast.ImportFrom)) and not _for_type_checkers(statement):
                for owner, key in _owners(statement):
                    self.parts[owner].append((key, statement))

    def leads_to(self, statement: ast.AST) -> Iterator[Place]:
        """Yield the definitions of the package used by a statement; a module passed as a value counts as a whole."""
        inner = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                dotted, name = self.imports.get(node.value.id, (None, ""))
                if dotted is not None and name == "*" and not (node.value.id == self.package.name and self.whole):
                    inner.add(node.value)
                    yield dotted, node.attr
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node not in inner:
                if node.id == self.package.name and self.whole:
                    yield from self.whole
                elif node.id in self.imports:
                    yield self.imports[node.id]
                if self.dotted != NOTEBOOK and node.id in self.parts:
                    yield self.dotted, node.id
        if self.dotted != NOTEBOOK:
            yield from self._tables_used_whole(statement)

    def _tables_used_whole(self, statement: ast.AST) -> Iterator[Place]:
        by_key = {id(node) for parent in ast.walk(statement) for node in _looked_up_by_key(parent)}
        for node in ast.walk(statement):
            if id(node) in by_key or not isinstance(node, (ast.Name, ast.Attribute)):
                continue
            if (isinstance(node, ast.Name) and node.id in self.parts and _is_table(self, node.id)
                    and isinstance(node.ctx, ast.Load)):
                yield self.dotted, node.id + ENTRIES
            elif place := self.resolved(node):
                dotted, name = followed(place, self.package)
                if name != "*" and _is_table(source_module(dotted, self.package), name):
                    yield dotted, name + ENTRIES

    def resolved(self, node: ast.AST) -> Place | None:
        """Return the place of the package that an imported name, or an attribute of an imported module, means."""
        if isinstance(node, ast.Name) and node.id in self.imports:
            return self.imports[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted, name = self.imports.get(node.value.id, ("", ""))
            return (dotted, node.attr) if name == "*" else None
        return None


def followed(place: Place, package: Path) -> Place:
    """Return the place of the definition of a name that modules may re-export."""
    dotted, name = place
    module = source_module(dotted, package)
    while name not in module.parts and module.imports.get(name, place) not in (place, (dotted, name)):
        dotted, name = place = module.imports[name]
        module = source_module(dotted, package)
    return dotted, name


def _is_table(module: SourceModule, name: str) -> bool:
    """Return whether a name holds a table: more than one statement adds to it."""
    return len(module.parts.get(name, ())) > 1 and any(
        isinstance(s, (ast.Assign, ast.AnnAssign)) and key == name for key, s in module.parts[name])


def _looked_up_by_key(parent: ast.AST) -> list[ast.AST]:
    """Return the children of ``parent`` that are accessed by key, as in ``TABLE[key]``."""
    if isinstance(parent, ast.Subscript) or (isinstance(parent, ast.Attribute) and parent.attr in BY_KEY):
        return [parent.value]
    if isinstance(parent, ast.Compare):
        return [right for operator, right in zip(parent.ops, parent.comparators, strict=True)
                if isinstance(operator, (ast.In, ast.NotIn))]
    if isinstance(parent, ast.Raise):  # messages list the allowed keys
        return list(ast.walk(parent))
    return []


@lru_cache(maxsize=512)
def _read(path: Path, dotted: str, package: Path, changed_ns: int) -> SourceModule:
    return SourceModule(dotted, path.read_text(), package)


def source_module(dotted: str, package: Path) -> SourceModule:
    path = _file(dotted, package)
    if path is None:
        return SourceModule(dotted, "", package)
    return _read(path, dotted, package, path.stat().st_mtime_ns)


def _file(dotted: str, package: Path) -> Path | None:
    """Return the file of a module or of a folder's ``__init__``; None where there is neither."""
    place = package.joinpath(*filter(None, dotted.split(".")))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _imports(node: ast.Import | ast.ImportFrom, package: Path, here: str) -> Iterator[tuple[str, Place]]:
    """Yield (local name, place) for every name that a statement imports from the package."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top, _, dotted = alias.name.partition(".")
            if top == package.name:
                yield alias.asname or top, (dotted, "*")
        return
    if node.level:
        inside = here.split(".") if _file(here, package) == package.joinpath(*here.split("."), "__init__.py") else (
            here.split(".")[:-1])
        origin = ".".join([*inside[:len(inside) - node.level + 1], *filter(None, [node.module])])
    else:
        top, _, origin = (node.module or "").partition(".")
        if top != package.name:
            return
    for alias in node.names:
        inner = ".".join(filter(None, [origin, alias.name]))
        yield alias.asname or alias.name, (inner, "*") if _file(inner, package) else (origin, alias.name)


def _for_type_checkers(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def _owners(statement: ast.stmt) -> list[tuple[str, str]]:
    """Return (name, key) of the names a statement defines or adds to."""
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


def _unguarded(statement: ast.stmt) -> list[ast.stmt]:
    """Return the imports inside a ``with extra(...)``, which computes nothing; else the statement."""
    body = statement.body if isinstance(statement, ast.With) else []
    return body if body and all(isinstance(part, (ast.Import, ast.ImportFrom)) for part in body) else [statement]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [part for statement in node.body for part in _unguarded(statement)]
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                    first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return tree
