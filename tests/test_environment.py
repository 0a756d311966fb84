"""pyproject.toml, requirements.lock and environment.yml describe one environment."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT.get("optional-dependencies", {})
OWN = canonicalize_name(PROJECT["name"])
WANTED = list({r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])])
               if canonicalize_name(r.name) != OWN}.values())
LOCK = (ROOT / "requirements.lock").read_text()


def locked():
    """name -> [(version, hashes, marker), ...]; more than one where Pythons or systems need different ones."""
    found = {}
    for line in LOCK.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            parsed = Requirement(requirement)
            operators = [(s.operator, "*" in s.version) for s in parsed.specifier]
            assert operators == [("==", False)], f"not pinned to one version: {requirement}"
            version = Version(next(iter(parsed.specifier)).version)
            found.setdefault(canonicalize_name(parsed.name), []).append((version, hashes, parsed.marker))
    return found


def test_every_line_of_the_lock_is_one_exact_version_with_sha256_hashes():
    found = locked()
    assert len(found) > len(WANTED)  # what the dependencies need themselves is there too
    for name, pins in found.items():
        for _, hashes, _ in pins:
            assert hashes, f"{name} has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h.strip()) for h in hashes), name


def test_the_lock_names_no_index_no_address_and_no_path():
    assert not re.findall(r"(?i)https?://|file:|git\+|--(?:extra-)?index-url|--find-links|--trusted-host|^-[ief]\b",
                          LOCK, re.M)


@pytest.mark.parametrize("wanted", WANTED, ids=lambda r: r.name)
def test_every_dependency_is_locked_within_its_range(wanted):
    pins = locked().get(canonicalize_name(wanted.name), [])
    assert pins, f"{wanted.name} is not in the lock"
    for version, *_ in pins:
        assert wanted.specifier.contains(version), f"{wanted} but {version} in the lock"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_gets_one_version_of_everything(python):
    chosen = {"python_version": python, "python_full_version": f"{python}.1"}
    count = {name: sum(marker is None or marker.evaluate(chosen) for *_, marker in pins)
             for name, pins in locked().items()}
    assert not [name for name, n in count.items() if n > 1]
    assert not [r.name for r in WANTED if count[canonicalize_name(r.name)] != 1]


def brought(extra):
    """Names of the packages that an extra (None: the core) brings, those of extras it names included."""
    found = set()
    for requirement in map(Requirement, EXTRAS[extra] if extra else PROJECT["dependencies"]):
        if canonicalize_name(requirement.name) == OWN:
            found |= set().union(*(brought(name) for name in requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def imports(node, extra=None):
    """Yield (package, extra that guards the import) for every import below ``node`` but those for type checkers."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name.split(".")[0], extra) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module.split(".")[0], extra
    for call in [item.context_expr for item in node.items] if isinstance(node, ast.With) else []:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "extra" and isinstance(call.args[0], ast.Constant):
            extra = ast.literal_eval(call.args[0])
    for child in ast.iter_child_nodes(node):
        yield from imports(child, extra)


def test_every_import_of_the_library_is_in_the_core_or_guarded_by_the_extra_that_brings_it():
    """What comes along with something else today may be gone with its next release."""
    owners, wrong = packages_distributions(), set()
    for path in (ROOT / "pruning_lib").rglob("*.py"):
        for name, extra in imports(ast.parse(path.read_text())):
            if name not in {*sys.stdlib_module_names, "pruning_lib", "__future__"}:
                have = brought(None) | {"huggingface-hub"} | (brought(extra) if extra else set())  # of transformers
                if not {canonicalize_name(d) for d in owners.get(name, [name])} & have:
                    wrong.add((path.name, name, extra))
    assert not wrong


def test_the_extra_all_brings_every_other_one_and_the_core_is_that_of_the_design():
    assert brought("dev") > brought("all") == set().union(*(brought(name) for name in set(EXTRAS) - {"dev"}))
    assert brought(None) == {"torch", "transformers", "safetensors", "accelerate", "numpy", "scipy", "tqdm"}


def test_conda_users_get_the_same_python_and_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    from_pip = [line for d in environment["dependencies"] if isinstance(d, dict) for line in d["pip"]]
    assert {re.match(r"[\w-]+", d).group() for d in plain} == {"python", "pip"}, "all else comes from the lock"
    python = next(d for d in plain if d.startswith("python")).removeprefix("python").strip()
    exact = re.fullmatch(r"=(\d+\.\d+)(\.\*)?", python)
    if exact:
        assert SpecifierSet(PROJECT["requires-python"]).contains(Version(f"{exact.group(1)}.99"))
    else:
        assert SpecifierSet(python) == SpecifierSet(PROJECT["requires-python"])
    assert any(re.fullmatch(r"(-r|--requirement)[ =]requirements\.lock", line.strip()) for line in from_pip)
    named = [line for line in from_pip if not line.lstrip().startswith("-")]
    assert not named, f"pinned nowhere: {named}"
    assert not re.search(r"https?://|index-url", yaml.safe_dump(environment))


def test_this_python_is_one_the_project_says_it_runs_on():
    assert SpecifierSet(PROJECT["requires-python"]).contains(Version(sys.version.split()[0]))
