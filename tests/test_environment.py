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
WANTED = [Requirement(r) for r in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]]
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


def test_every_package_the_library_imports_is_declared():
    """What comes along with something else today may be gone with its next release."""
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    owners, missing = packages_distributions(), {}
    for path in (ROOT / "pruning_lib").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"pruning_lib"}:
                if not {canonicalize_name(d) for d in owners.get(name, [name])} & declared:
                    missing.setdefault(name, set()).add(path.name)
    assert not missing, f"imported, but not among the dependencies of pyproject.toml: {missing}"


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
