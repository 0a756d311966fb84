"""The book: stored pages with the current prose of their notebooks, rendered as HTML.

Order of this file: prose · building.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra
from pruning_lib.experiments.runs import Tree, defaults, rows
from pruning_lib.report import slides

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


def build_book(root: Path, out: Path | None = None) -> Path:
    """Render the book with warnings as errors and return its index page.

    Without ``out`` the published report is rendered into ``build/report``.  With ``out`` the book is rendered from the
    pages in that folder and the same chapters; the published page replaces a missing reading.

    Raises
    ------
    SystemExit
        if there are no pages, or the builder reports a warning or an error.
    """
    tree = Tree.at(root, out)
    if not tree.pages.is_dir():
        raise SystemExit(f"no pages in {tree.pages}; create them with: pruning-lib run")
    book = (out or root / "build" / "report") / "book"
    shutil.rmtree(book, ignore_errors=True)
    shutil.copytree(root / "book", book, ignore=shutil.ignore_patterns("executed", "_build"))
    shutil.copytree(tree.pages, book / "executed")
    for row in rows(tree).values():  # chapters quote readings; use the published page of a missing one
        page = Tree.at(root).pages / f"{row.name}.ipynb"
        if row.name == row.notebook and page.is_file() and not (book / "executed" / page.name).exists():
            shutil.copyfile(page, book / "executed" / page.name)
    _refresh_all(book / "executed", tree.notebooks)
    shutil.copytree(Path(__file__).resolve().parents[1], book.parent / "pruning_lib", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("_tree", "__pycache__"))  # chapters quote the code
    if (root / "CONTRIBUTING.md").is_file():  # one chapter includes the recipes
        shutil.copyfile(root / "CONTRIBUTING.md", book.parent / "CONTRIBUTING.md")
    contents = yaml.safe_load((book / "_toc.yml").read_text())
    runs = (defaults(tree) if out else rows(tree)).values()
    listed = {chapter["file"] for part in contents["parts"] for chapter in part["chapters"]}
    pages = [row.name for row in runs if not row.reading and (book / "executed" / f"{row.name}.ipynb").is_file()]
    pages += sorted({path.stem for path in tree.pages.glob("*.ipynb")} - set(pages)) if out else []  # named by the user
    contents["parts"][-1]["chapters"] = [{"file": file, "title": name} for name in pages
                                         if (file := f"executed/{name}") not in listed]
    (book / "_toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False))
    builder = Path(sys.executable).with_name("jupyter-book")
    command = [str(builder), "build", str(book), "-n", "-W", "--keep-going", "-q"]
    if subprocess.run(command, env={**os.environ, "PRUNING_RESULTS": str(tree.records.resolve())}).returncode:
        raise SystemExit(f"the book was not built cleanly; see the messages above. Sources: {book}")
    html = book / "_build" / "html"
    if (book / "slides.yml").is_file():
        slides.build(html, book / "slides.yml")
    return html / "index.html"
