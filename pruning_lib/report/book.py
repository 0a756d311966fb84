"""The book: stored pages with the current prose of their notebooks, rendered as HTML.

Order of this file: prose · sources · building.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra
from pruning_lib.experiments.runs import Row, Tree, defaults, rows
from pruning_lib.report import browser_python, run_index, slides

with extra("report"):
    import nbformat
    import yaml


def refresh_prose(page: Any, notebook: Any) -> Any:
    """Return the cells of an executed page with the current prose of its notebook.

    A page of different code keeps its stored prose, which describes that code.
    """
    def code(cells: Any) -> list[tuple[str, str]]:
        return [(cell.id, cell.source) for cell in cells if cell.cell_type == "code" and cell not in injected]

    injected = [cell for cell in page.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    if code(notebook.cells) != code(page.cells):
        return page.cells
    made, cells = {cell.id: cell for cell in page.cells}, []
    for cell in notebook.cells:
        told = made.get(cell.id, cell)
        told.source = cell.source
        cells += [told, *(injected if "parameters" in cell.metadata.get("tags", []) else [])]
    return cells


def _refresh_all(pages: Path, notebooks: Path) -> None:
    """Update the prose of all pages in a folder; skip unreadable pages, which the builder reports."""
    for path in pages.glob("*.ipynb"):
        with suppress(nbformat.reader.NotJSONError, UnicodeDecodeError, AttributeError, KeyError):
            page = nbformat.read(path, as_version=4)
            notebook = notebooks / f"{page.metadata['pruning_lib']['notebook']}.ipynb"
            if notebook.is_file():
                page.cells = refresh_prose(page, nbformat.read(notebook, as_version=4))
                page.metadata["pruning_lib"].pop("code", None)  # digests are for the runner, not for readers
                nbformat.write(page, path)


def _copy_sources(root: Path, tree: Tree, book: Path) -> None:
    """Copy chapters, pages with today's prose, and the code that chapters quote into a new folder ``book``."""
    shutil.rmtree(book, ignore_errors=True)
    shutil.copytree(root / "book", book, ignore=shutil.ignore_patterns("executed", "_build", "__pycache__"))
    shutil.copytree(tree.pages, book / "executed")
    for row in rows(tree).values():  # chapters quote readings; use the published page of a missing one
        page = Tree.at(root).pages / f"{row.name}.ipynb"
        if row.name == row.notebook and page.is_file() and not (book / "executed" / page.name).exists():
            shutil.copyfile(page, book / "executed" / page.name)
    _refresh_all(book / "executed", tree.notebooks)
    shutil.copytree(Path(__file__).resolve().parents[1], book.parent / "pruning_lib", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("_tree", "__pycache__"))
    if (root / "CONTRIBUTING.md").is_file():  # one chapter includes the recipes
        shutil.copyfile(root / "CONTRIBUTING.md", book.parent / "CONTRIBUTING.md")


def _named_by_the_user(tree: Tree, known: Collection[str]) -> Iterator[Row]:
    """Yield a row for each page that was run under a name of its own."""
    for path in sorted(tree.pages.glob("*.ipynb")):
        if path.stem not in known:
            made = nbformat.read(path, as_version=4).metadata.get("pruning_lib", {})
            yield Row(path.stem, made.get("notebook", path.stem), made.get("parameters", {}))


def _index_runs(tree: Tree, book: Path, made: Sequence[Row]) -> None:
    """Write the tables of runs that chapters include, and the titles of their pages; delete pages of no row.

    Pages of runs are not in the table of contents, so ``_runs.json`` also tells the builder which pages those are.
    """
    contents = yaml.safe_load((book / "_toc.yml").read_text())
    listed = {chapter["file"] for part in contents.get("parts", []) for chapter in part["chapters"]}
    runs = [row for row in made if not row.reading and f"executed/{row.name}" not in listed
            and (book / "executed" / f"{row.name}.ipynb").is_file()]
    known = {f"{row.name}.ipynb" for row in runs} | {Path(name).name + ".ipynb" for name in listed}
    for page in (book / "executed").glob("*.ipynb"):
        if page.name not in known:
            page.unlink()
    titles = run_index.titles(runs, tree)
    (book / "_runs.json").write_text(json.dumps({f"executed/{name}": title for name, title in titles.items()}))
    linked = [row for row in rows(tree).values()  # a book of one's own may lack a reading
              if not row.reading or (book / "executed" / f"{row.name}.ipynb").is_file()]
    (book / "_waiting.md").write_text(run_index.waiting(rows(tree).values(), tree))
    (book / "_runs.md").write_text(run_index.table(runs, linked, tree, book / "chapters" / "claims.md"))


def _ship_python(folder: Path) -> None:
    """Add Python for the reader's browser; without the package index the pages show code and output only."""
    try:
        browser_python.ship(folder)
    except ConnectionError as error:
        print(f"the book has no Python for the reader's browser: {error}", file=sys.stderr)


def build_book(root: Path, out: Path | None = None) -> Path:
    """Render the book with warnings as errors and return its index page.

    Without ``out`` the published report is rendered into ``build/report``.  With ``out`` the book is rendered from the
    pages in that folder and the same chapters; the published page replaces a missing reading.

    Raises
    ------
    SystemExit
        if there are no pages, or the builder reports a warning or an error.
    """
    tree, book = Tree.at(root, out), (out or root / "build" / "report") / "book"
    if not tree.pages.is_dir():
        raise SystemExit(f"no pages in {tree.pages}; create them with: pruning-lib run")
    _copy_sources(root, tree, book)
    made = defaults(tree) if out else rows(tree)
    _index_runs(tree, book, [*made.values(), *(_named_by_the_user(tree, made) if out else [])])
    html = _built(root, book, tree, "-n", "-W", "--keep-going")
    if (book / "slides.yml").is_file():
        slides.build(html, book / "slides.yml")
    if (html / "_static" / "live").is_dir():
        _ship_python(html / "_static" / "pyodide")
    return html / "index.html"


def build_page(root: Path, name: str, out: Path | None = None) -> Path:
    """Render the page of one row alone and return it; it takes seconds, and links to other pages lead nowhere.

    Raises
    ------
    SystemExit
        if the page was not run, or the builder fails.
    """
    tree, book = Tree.at(root, out), (out or root / "build" / "report") / "page"
    page = tree.pages / f"{name}.ipynb"
    if not page.is_file():
        raise SystemExit(f"no page {page}; create it with: pruning-lib run {name}")
    shutil.rmtree(book, ignore_errors=True)
    leave_out = shutil.ignore_patterns("executed", "chapters", "drawings", "__pycache__")
    shutil.copytree(root / "book", book, ignore=leave_out)
    (book / "executed").mkdir()
    shutil.copyfile(page, book / "executed" / page.name)
    _refresh_all(book / "executed", tree.notebooks)
    (book / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": f"executed/{name}"}))
    return _built(root, book, tree) / "executed" / f"{name}.html"


def _built(root: Path, book: Path, tree: Tree, *options: str) -> Path:
    """Render the sources in a folder and return the folder of the site."""
    builder = Path(sys.executable).with_name("jupyter-book")
    command = [str(builder), "build", str(book), *options, "-q"]
    places = {"PRUNING_RESULTS": str(tree.records.resolve()), "PRUNING_RECORDS": str(Tree.at(root).records.resolve())}
    if subprocess.run(command, env={**os.environ, **places}).returncode:
        raise SystemExit(f"the book was not built cleanly; see the messages above. Sources: {book}")
    return book / "_build" / "html"
