"""The public names are light to import, the same for type checkers and at run time, and documented."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pruning_lib as pl
from pruning_lib import _renamed

HEAVY = {"torch", "transformers", "numpy", "pandas", "scipy", "matplotlib"}


def loaded_by(code):
    """Return the top-level modules that a fresh interpreter has loaded after running ``code``."""
    show = "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True
                              ).stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_by("import pruning_lib") & HEAVY


def test_type_checkers_see_the_names_that_are_there_at_run_time():
    tree = ast.parse(Path(pl.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: f"{node.module}.{alias.name}".removeprefix("pruning_lib.")
            for node in block.body for alias in node.names}
    assert seen == pl._PUBLIC


@pytest.mark.parametrize("name", pl._PUBLIC)
def test_a_public_name_is_there_and_its_first_line_says_what_it_does(name):
    found = getattr(pl, name)
    assert found.__doc__ and found.__doc__.strip().splitlines()[0].endswith(".")
    assert name in dir(pl)


def test_help_begins_with_a_model_pruned_and_saved():
    assert pl.__doc__.index("pl.load_model") < pl.__doc__.index("pl.prune(") < pl.__doc__.index("pl.save(")
    assert (Path(pl.__file__).parent / "py.typed").is_file()


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'prun'; it has .*load_model, .*prune"):
        pl.prun  # noqa: B018


@pytest.mark.parametrize("module", _renamed.MODULES)
def test_a_module_of_before_works_and_warns(module):
    old = getattr(pl, module)
    place = f"pruning_lib.{_renamed.MODULES[module]}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert old.__getattr__("__doc__") and f"{module}.__doc__ is {place}.__doc__" in str(caught[0].message)


@pytest.mark.parametrize(("old", "new"), _renamed.NAMES.items())
def test_a_name_of_before_is_the_one_of_today(old, new):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"pruning_lib.{old} is pruning_lib.{new}"):
        found = getattr(__import__("importlib").import_module("pruning_lib.models"), name) if module == "models" else (
            getattr(getattr(pl, module), name))
    today, _, attribute = new.rpartition(".")
    assert found is getattr(__import__("importlib").import_module(f"pruning_lib.{today}"), attribute)
