"""Digests of the code that a notebook uses: one for every definition of this package reachable from its imports.

References lead from definition to definition; an entry of a table belongs to the table.  A digest is computed from the
syntax tree in a canonical form, so that it depends only on code that can change a number.  Docstrings, comments,
layout, type annotations, the text of error messages and import aliases do not count.  If code uses a table as a whole
(in a loop, for example), the names of its entries are part of the digests, because a new entry changes the result.
Order of this file: digests · one module · imports · canonical form.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path

from pruning_lib import _files

PACKAGE = Path(__file__).resolve().parents[1]
ALWAYS = "<module>"  # statements that belong to no name
NOTEBOOK = "<notebook>"
ENTRIES = "[*]"  # suffix of the digest of all names in a table
WORD = "*."  # before an attribute, argument or variable in a map of names
BY_KEY = ("get", "register", "facts")  # attributes of a table that access one entry
_digest = partial(_files.digest, digits=8)
Place = tuple[str, str]  # dotted module inside the package, name in it; "*" for all of it


def digests(cells: Iterable[str], package: Path = PACKAGE, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``"module.name"`` -> 8 hex digits for the cells and every definition that they use.

    Parameters
    ----------
    cells : code cells of a notebook
    package : folder of the package whose definitions are followed
    names : today's names of modules (``"module"``), definitions (``"module.name"``), and attributes, arguments or
        variables (``"*.name"``) that were renamed; with them the code of an earlier version has the digests of today's
        where nothing but names changed
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


def _notebook(cells: Iterable[str], package: Path) -> _Module:
    return _Module(NOTEBOOK, "\n".join(filter(None, map(_python, cells))), package)


def _of_cells(notebook: _Module, renamed: Mapping[str, str]) -> str:
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
    module = _module(dotted, package)
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


# --- one module -------------------------------------------------------------------------------------------------------


class _Module:
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
            elif place := self._resolved(node):
                dotted, name = _followed(place, self.package)
                if name != "*" and _is_table(_module(dotted, self.package), name):
                    yield dotted, name + ENTRIES

    def _resolved(self, node: ast.AST) -> Place | None:
        """Return the place of the package that an imported name, or an attribute of an imported module, means."""
        if isinstance(node, ast.Name) and node.id in self.imports:
            return self.imports[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted, name = self.imports.get(node.value.id, ("", ""))
            return (dotted, node.attr) if name == "*" else None
        return None


def _followed(place: Place, package: Path) -> Place:
    """Return the place of the definition of a name that modules may re-export."""
    dotted, name = place
    module = _module(dotted, package)
    while name not in module.parts and module.imports.get(name, place) not in (place, (dotted, name)):
        dotted, name = place = module.imports[name]
        module = _module(dotted, package)
    return dotted, name


def _is_table(module: _Module, name: str) -> bool:
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
def _read(path: Path, dotted: str, package: Path, changed_ns: int) -> _Module:
    return _Module(dotted, path.read_text(), package)


def _module(dotted: str, package: Path) -> _Module:
    path = _file(dotted, package)
    if path is None:
        return _Module(dotted, "", package)
    return _read(path, dotted, package, path.stat().st_mtime_ns)


def _file(dotted: str, package: Path) -> Path | None:
    """Return the file of a module or of a folder's ``__init__``; None where there is neither."""
    place = package.joinpath(*filter(None, dotted.split(".")))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


# --- imports ----------------------------------------------------------------------------------------------------------


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


def _python(cell: str) -> str:
    """Return a cell without IPython's own lines; empty if the rest is not valid Python."""
    text = "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    return text


# --- canonical form ---------------------------------------------------------------------------------------------------


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                    first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _canonical(module: _Module, statement: ast.stmt, renamed: Mapping[str, str]) -> str:
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

    def __init__(self, module: _Module, renamed: Mapping[str, str]) -> None:
        self.module, self.renamed = module, renamed

    def _in_full(self, place: Place) -> ast.Name:
        dotted, name = _followed(place, self.module.package)
        return ast.Name(_renamed(dotted if name == "*" else f"{dotted}.{name}", self.renamed), ast.Load())

    def _word(self, word: str) -> str:
        return self.renamed.get(WORD + word, word)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        place = self.module._resolved(node)
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

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._word(node.arg))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        for inner in ast.walk(node):
            for field, value in ast.iter_fields(inner):
                if isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str)):
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
