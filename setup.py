"""The build step that puts the inputs, notebooks and book sources into the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
IGNORED = shutil.ignore_patterns("executed", "_build", "__pycache__", ".ipynb_checkpoints")


class BuildWithTree(build_py):
    """Copy what ``pruning-lib init`` lays out to ``pruning_lib/_tree``; an editable install uses the repository."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            lay_out(Path(self.build_lib) / "pruning_lib" / "_tree")


def lay_out(target: Path) -> None:
    """Copy the tree that runs and the book need to ``target``, without the pages that runs make anew."""
    shutil.rmtree(target, ignore_errors=True)
    for name in ("notebooks", "book", "data/inputs", "data/results"):
        shutil.copytree(ROOT / name, target / name, ignore=IGNORED)
    shutil.copy(ROOT / "CONTRIBUTING.md", target)  # a chapter prints the recipes
    (target / "book" / "executed").mkdir()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):  # chapters quote these pages
        page = ROOT / "book" / "executed" / notebook.name
        if page.is_file():
            shutil.copy(page, target / "book" / "executed")


setup(cmdclass={"build_py": BuildWithTree})
