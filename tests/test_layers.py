"""Modules import only from lower levels; importing one prints, draws and seeds nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pruning_lib

LEVELS = {
    "registry": 0, "resnets": 0, "least_squares": 0, "downloads": 0, "locks": 0, "reach": 0, "slides": 0,
    "families": 1, "data": 1, "results": 1, "similarity": 1, "images": 1, "shapes": 1, "fused": 1, "corruptions": 1,
    "shortcuts": 1,
    "plans": 2, "block_plans": 2, "activations": 2, "offload": 2, "rows": 2,
    "surgery": 3, "cost": 3, "amp": 3, "harness": 3, "attacks": 3, "inputs": 3,
    "staleness": 4, "consensus": 4, "compensate": 4, "evaluate": 4, "finetune": 4, "speed": 4, "plots": 4,
    "networks": 4,
    "baselines": 5, "recover": 5, "store": 5, "checkpoints": 5, "criteria": 5, "experiments": 5,
    "models": 6, "process": 6, "subjects": 6, "recipes": 6,
    "practice": 7, "runner": 7,
    "cluster": 8,
    "cli": 9,
}
MODULES = sorted(p for p in Path(pruning_lib.__file__).parent.glob("*.py") if p.stem != "__init__")
# only they know papermill, Dask and the tree
RUNNERS = {"rows", "inputs", "staleness", "experiments", "process", "runner", "cluster", "cli"}


def imported(path, *, when_loaded=False):
    """Dotted names a file imports, anywhere or at its top level: ``a.b`` for ``import a.b`` and ``from a import b``."""
    tree = ast.parse(path.read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["pruning_lib" if node.level else "", node.module]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ours(path):
    """Names of our modules that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("pruning_lib.")} - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_only_point_down(path):
    assert path.stem in LEVELS, f"give {path.stem} a level in this file"
    unknown = ours(path) - set(LEVELS)
    assert not unknown, f"{path.stem} imports {unknown}: unknown, or the package instead of its modules"
    above = {name for name in ours(path) if LEVELS[name] >= LEVELS[path.stem]}
    assert not above, f"{path.stem} (level {LEVELS[path.stem]}) imports {above}, not below it"


def test_the_package_itself_imports_nothing():
    assert not set(imported(Path(pruning_lib.__file__)))


def test_the_reader_of_imports_sees_them_in_every_form(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import pruning_lib.amp\nfrom pruning_lib import plans, surgery as s\n"
                    "from pruning_lib.data import texts\nfrom . import cost\nfrom .models import load\n"
                    "def f():\n    from pruning_lib.evaluate import perplexity\n    import torch\n")
    assert ours(path) == {"amp", "plans", "surgery", "data", "cost", "models", "evaluate"}


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem not in RUNNERS], ids=lambda p: p.stem)
def test_only_the_runners_know_papermill_and_dask(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"papermill", "dask", "distributed", "nbformat"}


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "plots"], ids=lambda p: p.stem)
def test_only_plots_loads_matplotlib_when_imported(path):
    assert "matplotlib" not in {name.split(".")[0] for name in imported(path, when_loaded=True)}


def test_importing_every_module_prints_nothing_and_seeds_nothing():
    names = ", ".join(f"pruning_lib.{p.stem}" for p in MODULES)
    code = ("import random, numpy, torch\n"
            "torch.manual_seed(7); numpy.random.seed(7); random.seed(7)\n"
            "before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()\n"
            f"import {names}\n"
            "assert torch.equal(torch.get_rng_state(), before[0])\n"
            "assert numpy.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
