"""Modules import only from lower levels; importing one prints, draws and seeds nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pruning_lib

FOLDERS = ("models", "data", "pruning", "training", "evaluation", "experiments", "report", "cli")  # in order
PRIVATE = ("_registry", "_files", "_locks", "_renamed", "_extras")  # below all of them
PACKAGE = Path(pruning_lib.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py")
                 if path.parent != PACKAGE or path.stem not in ("__init__", "__main__"))
# only they know papermill, Dask and the tree of the report
RUNNERS = ("experiments", "report", "cli")
MOST_LINES = 350


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def level(module):
    """Return the place of a module's folder in the order of imports; private modules are below all folders."""
    top = module.split(".")[0]
    return -1 if top in PRIVATE else FOLDERS.index(top)


def imported(path, *, when_loaded=False):
    """Return the dotted names a file imports, anywhere or at top level, e.g. ``a.b`` for ``from a import b``."""
    tree = ast.parse(path.read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["pruning_lib" if node.level else "", node.module]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ours(path):
    """Return the dotted modules of the package that a file imports."""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == PACKAGE.name and parts[1:] and parts[1] != "__version__":
            found.add(next(".".join(parts[1:n]) for n in range(len(parts), 1, -1) if n == 2 or is_module(parts[1:n])))
    return found


def is_module(parts):
    place = PACKAGE.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_the_folders_are_those_of_the_design():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*PRIVATE, "__init__", "__main__"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_between_folders_only_point_up_the_list(path):
    later = {name for name in ours(path) if level(name) > level(dotted(path))}
    assert not later, f"{dotted(path)} imports {later}, from a later step of the work: {', '.join(FOLDERS)}"


def test_no_module_imports_itself_through_others():
    arrows = {dotted(path): ours(path) - {dotted(path)} for path in MODULES}
    while leaves := [name for name, targets in arrows.items() if not targets & set(arrows)]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"a cycle of imports among {', '.join(arrows)}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_is_short_enough_to_be_read_at_a_sitting(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_the_reader_of_imports_sees_them_in_every_form(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import pruning_lib.pruning.amp\nfrom pruning_lib.models import plan, surgery as s\n"
                    "from pruning_lib.data import texts\nfrom pruning_lib import _locks, __version__\n"
                    "def f():\n    from pruning_lib.evaluation.quality import perplexity\n    import torch\n")
    assert ours(path) == {"pruning.amp", "models.plan", "models.surgery", "data", "_locks", "evaluation.quality"}


@pytest.mark.parametrize("path", [p for p in MODULES if not dotted(p).startswith(RUNNERS)], ids=dotted)
def test_only_the_runners_know_papermill_and_dask(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"papermill", "dask", "distributed", "nbformat"}


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "plots"], ids=dotted)
def test_only_plots_loads_matplotlib_when_imported(path):
    assert "matplotlib" not in {name.split(".")[0] for name in imported(path, when_loaded=True)}


def test_importing_every_module_prints_nothing_and_seeds_nothing():
    names = ", ".join(f"pruning_lib.{dotted(p)}" for p in MODULES)
    code = ("import random, numpy, torch\n"
            "torch.manual_seed(7); numpy.random.seed(7); random.seed(7)\n"
            "before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()\n"
            f"import {names}\n"
            "assert torch.equal(torch.get_rng_state(), before[0])\n"
            "assert numpy.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
