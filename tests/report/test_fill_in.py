"""Fill-in exercises: the tests that students run pass with the solution, and fail with the stub and with mistakes."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pruning_lib import _files

FOLDER = Path(__file__).resolve().parents[2] / "book" / "exercises"
CHAPTER = FOLDER.parent / "chapters" / "fill_in.md"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("test_"))
HEADER = r'\A"""Exercise (\d+): (.+?)\.  Difficulty: ([123]) of 3\.  Time: (\d+) minutes\.\n\nRead first: .+\n"""'

# exercise -> (right, wrong): mistakes that students make; the tests have to notice each of them
MISTAKES = {
    "importance": [(".abs().sum(2)", ".sum(2).abs()"), (".abs().sum(2)", ".norm(dim=2)"),
                   (".mean(1) for x in prompts]).mean(0)", ".sum(1) for x in prompts]).mean(0)"),
                   (".mean(1) for x in prompts]).mean(0)",
                    ".sum(1) for x in prompts]).sum(0) / sum(map(len, prompts))"),
                   ("w_out.split(width, 1)", "w_out.abs().split(width, 1)")],
    "plan": [("stable=True)", "stable=True, descending=True)"), (".sort(dim=1).values", ""),
             (".mean(2), count)", ".amax(2), count)"), ("* size + torch", "+ groups * torch"),
             (" - heads_parameters", ""), ("fraction * parameters / blocks", "fraction * parameters"),
             ("(3 * width)", "width")],
    "cut": [("down[:, stays]", "down[:, :len(stays)]"), (".view(groups, -1, C)[stays].flatten(0, 1)",
                                                         ".view(-1, groups, C)[:, stays].flatten(0, 1)"),
            ("o.view(len(o), groups, -1)[:, stays].flatten(1)", "o.view(len(o), -1, groups)[..., stays].flatten(1)"),
            ("if n not in set(removed)", "if n in set(removed)"),
            ("up[stays], down[:, stays]", "up[stays], down.zero_()[:, stays]")],
    "reconstruction": [("weight[:, stays] + change.T", "change.T"), ("weight[:, stays] + change.T", "weight[:, stays]"),
                       ("kept.diagonal().mean()", "1"), ("new = torch.zeros_like(weight)", "new = weight"),
                       ("gram = x.T @ x", "gram = (x - x.mean(0)).T @ (x - x.mean(0))"), ("+ ridge *", "+ 0 *")],
    "cka": [("x - x.mean(0), y - y.mean(0)", "x, y"), (".norm() ** 2", ".norm()"), ("1 - shared", "shared"),
            ("(x.T @ x).norm() * (y.T @ y).norm()", "x.norm() ** 2 * y.norm() ** 2")],
    "rank_sum": [("other < value", "other > value"), (" + (same - 1) / 2", ""),
                 ("sum(other < value", "1 + sum(other < value"),
                 ("key=sums.get", "key=lambda name: (sums[name], name)"),
                 ("[ranks([by_block[name] for name in names]) for", "[[by_block[name] for name in names] for")],
    "attack": [("images.grad.sign()", "images.grad"), ("images + epsilon * direction", "images - epsilon * direction"),
               (".clamp(0, 1)\n\n\ndef pgd", "\n\n\ndef pgd"),
               ("torch.minimum(torch.maximum(changed, images - epsilon), images + epsilon)", "changed"),
               ("direction(network, changed, labels)", "direction(network, images, labels)"),
               ("images.grad.sign()", "images.grad / images.grad.norm()")],
    "emissions": [("power_w * share - idle_w", "(power_w - idle_w) * share"), ("3.6e6", "3600"), ("1000 * ", ""),
                  ("power_w * share", "power_w"), ("if saved > 0 else math.inf", "if saved else math.inf"),
                  (" - idle_w", "")],
    "bures": [("2 * root(a @ r @ a)", "root(a @ r @ a)"), ("root(a @ r @ a)", "(a @ root(r))"),
              ("square.item()) ** 0.5", "square.item())"), (".clamp(min=0).sqrt()", ".clamp(min=0)")],
    "perplexity": [("logits[:-1], tokens[1:]", "logits, tokens"), ("logits[:-1], tokens[1:]", "logits[1:], tokens[1:]"),
                   (".exp()", ""), ("tokens[1:])", "tokens[1:], reduction='sum')")],
}


def source(name, *, solved):
    return (FOLDER / "solutions" / f"{name}.py" if solved else FOLDER / f"{name}.py").read_text()


def failures(name, text, monkeypatch):
    """Return test -> error of the tests of an exercise, with ``text`` in place of the student's file."""
    student, tests = ModuleType(name), ModuleType(f"test_{name}")
    exec(compile(text, f"{name}.py", "exec"), student.__dict__)
    monkeypatch.setitem(sys.modules, name, student)
    exec(compile((FOLDER / f"test_{name}.py").read_text(), f"test_{name}.py", "exec"), tests.__dict__)
    found = {key: test for key, test in vars(tests).items() if key.startswith("test_")}
    assert len(found) >= 4, "at least four tests for an exercise"
    errors = {}
    for key, test in found.items():
        try:
            test()
        except Exception as error:
            errors[key] = error
    return errors, len(found)


def test_there_are_at_least_eight_exercises_and_each_has_tests_and_a_solution():
    assert len(NAMES) >= 8 and set(NAMES) == set(MISTAKES)
    assert NAMES == sorted(path.stem for path in (FOLDER / "solutions").glob("*.py"))
    assert NAMES == sorted(path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_test_fails_with_the_stub_and_passes_with_the_solution(name, monkeypatch):
    errors, number = failures(name, source(name, solved=False), monkeypatch)
    assert len(errors) == number and all(isinstance(error, NotImplementedError) for error in errors.values())
    assert not failures(name, source(name, solved=True), monkeypatch)[0]


@pytest.mark.parametrize(("name", "right", "wrong"), [(name, *pair) for name in MISTAKES for pair in MISTAKES[name]])
def test_a_mistake_is_noticed(name, right, wrong, monkeypatch):
    text = source(name, solved=True)
    assert right in text
    assert failures(name, text.replace(right, wrong), monkeypatch)[0]


@pytest.mark.parametrize("name", NAMES)
def test_stub_and_solution_have_the_same_functions(name):
    def signatures(text):
        return {node.name: [(a.arg, None) for a in node.args.args] for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef)}

    stub, solution = (signatures(source(name, solved=solved)) for solved in (False, True))
    assert stub and stub.items() <= solution.items()
    assert source(name, solved=False).count("raise NotImplementedError") == len(stub)


def test_students_run_the_tests_with_pytest_alone(tmp_path):
    """Run pytest as the README of the folder says, in a copy with the solutions filled in."""
    folder = tmp_path / "mine"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("solutions", "__pycache__"))
    for name in ("cka", "rank_sum"):
        shutil.copyfile(FOLDER / "solutions" / f"{name}.py", folder / f"{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for names, code in ((("cka", "rank_sum"), 0), (("emissions",), 1)):
        files = [f"test_{name}.py" for name in names]
        done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
    assert "NotImplementedError" in done.stdout


def test_difficulty_and_time_are_those_of_the_chapter():
    told = {}
    for name in NAMES:
        number, _, difficulty, minutes = re.match(HEADER, source(name, solved=False)).groups()
        told[name] = (number, difficulty, minutes)
    rows = re.findall(r"^\| (\d+) \| \{download\}`(\w+)\.py <\.\./exercises/\2\.py>` \| .+ \| ([123]) \| (\d+) \|",
                      CHAPTER.read_text(), re.M)
    assert {name: (number, difficulty, minutes) for number, name, difficulty, minutes in rows} == told
    assert sorted(int(number) for number, *_ in rows) == list(range(1, len(NAMES) + 1))


def test_the_exercises_travel_with_the_book():
    assert {path.name for path in FOLDER.iterdir()} >= {"README.md", "solutions"}
    assert (_files.tree() / "book" / "exercises" / "cka.py").is_file()
