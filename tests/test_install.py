"""The wheel in an environment that has the core only: the README is walked there, from another folder, without git."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_environment import PROJECT

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pruning_lib", "notebooks", "book", "data/inputs", "data/results", "pyproject.toml", "setup.py",
           "MANIFEST.in", "README.md", "LICENSE", "CONTRIBUTING.md")
README = (ROOT / "README.md").read_text()


def core():
    """Return the distributions that the core needs, with all that they need themselves."""
    found, todo = {}, [Requirement(text) for text in PROJECT["dependencies"]]
    while todo:
        wanted = todo.pop()
        if wanted.name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            found[wanted.name] = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        todo += map(Requirement, found[wanted.name].requires or [])
    return found.values()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources: a build leaves files behind."""
    work = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, work / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        ignored = shutil.ignore_patterns("__pycache__", "_build", "*.egg-info")
        shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w",
               work]
    subprocess.run([*command, work / "source"], check=True)
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """A virtual environment inside another repository, with links to the packages of the core, and the wheel."""
    repository = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", repository], check=True)
    subprocess.run(["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q",
                    "--allow-empty", "-m", "other"], check=True)
    folder, links = repository / ".venv", repository / "core"
    venv.create(folder, with_pip=False)
    links.mkdir()
    for distribution in core():
        for name in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            place = Path(distribution.locate_file(name))
            if place.exists() and not (links / name).exists():
                (links / name).symlink_to(place)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "core.pth").write_text(f"{links}\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps",
                    "--no-index", "--ignore-installed", "-q", wheel], check=True,
                   env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    return folder


def run(bare, folder, *command, path="", code=0):
    """Run a program of the bare environment in ``folder`` and return what it printed."""
    environment = {"PATH": path or str(bare / "bin"), "HOME": str(folder), "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([bare / "bin" / command[0], *map(str, command[1:])], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def walk(bare, folder, commands):
    """Run commands of the program one after the other in one process, whose imports take longer than most of them."""
    code = ("import json, sys\nfrom pruning_lib.cli import main\nfor words in json.loads(sys.argv[1]):\n"
            "    assert main.main(words) == 0, words\n")
    run(bare, folder, "python", "-c", code, json.dumps([[str(word) for word in words] for words in commands]))


@pytest.fixture(scope="module")
def model(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "model"
    tiny("llama", neurons=96, heads=6, groups=3, fields={"max_position_embeddings": 2048}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_wheel_carries_what_run_and_book_need_and_no_page_that_a_run_makes(bare, tmp_path):
    assert f"cd {tmp_path / 'mine'}" in run(bare, tmp_path, "pruning-lib", "init", tmp_path / "mine")
    for name in ("notebooks", "data/inputs", "data/results"):
        wanted = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*")
                  if p.is_file() and "__pycache__" not in p.parts}
        found = {p.relative_to(tmp_path / "mine" / name) for p in (tmp_path / "mine" / name).rglob("*") if p.is_file()}
        assert found == wanted, name
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.stem for path in (tmp_path / "mine" / "book" / "executed").iterdir()} <= notebooks
    assert (tmp_path / "mine" / "book" / "_toc.yml").is_file()
    assert "not empty" in run(bare, tmp_path, "pruning-lib", "init", tmp_path / "mine", code=1)


def test_the_readme_holds_in_an_environment_that_has_the_core_only(bare, model, tmp_path):
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace("smollm2-135m-instruct", str(model))
    program += ("\nimport sys"
                "\nassert not {'torchvision', 'pandas', 'papermill', 'matplotlib', 'lm_eval'} & set(sys.modules)"
                "\nimport pruning_lib; assert '.venv' in pruning_lib.__file__")
    run(bare, tmp_path, "python", "-c", program)
    assert (tmp_path / "smaller" / "model.safetensors").is_file()
    commands = [line.split()[1:] for line in README.splitlines() if line.startswith("    .venv/bin/pruning-lib")]
    walked = [line for line in commands if line[0] in ("inspect", "prune", "compare", "evaluate")]
    assert {line[0] for line in walked} >= {"inspect", "prune", "compare"}
    first, *others = [[str(model) if word == "path/to/folder" else word for word in line] for line in walked]
    run(bare, tmp_path, "pruning-lib", *first)
    walk(bare, tmp_path, others)
    assert "pruning" in run(bare, tmp_path, "python", "-m", "pruning_lib", "--help")
    asked = ("import pruning_lib as pl; help(pl); print('PLOTS')\n"
             "try: pl.plots.style()\nexcept ImportError as error: print(error)")
    shown, drawn = run(bare, tmp_path, "python", "-c", asked).split("PLOTS")
    assert "Prune a language model" in shown and "perplexity(" in shown and "not installed" not in shown
    assert "pruning-lib[report]" in drawn


def test_the_defaults_need_the_core_only(bare, model, tmp_path):
    """Neither prompts nor test text are named: those of the package stand in, and command and function agree."""
    wanted = ["prune", "--model", str(model), "--removed-fraction", "0.2", "--out"]
    said = run(bare, tmp_path, "python", "-c", f"""
import pruning_lib as pl
from pruning_lib.cli import main
for words in ({[*wanted, "a"]}, ["evaluate", "a"], ["compare", "a", {str(model)!r}]):
    assert main.main(words) == 0, words
model, tokenizer = pl.load_model({str(model)!r})
pl.save(pl.prune(model, tokenizer, removed_fraction=0.2).model, tokenizer, "b")
for given in (["--calibration", "alpaca"], ["--text", "wikitext2"]):
    assert main.main({[*wanted, "c"]} + given) == 1""")
    assert "--calibration mini_prompts, which is part of this package" in said and "--text mini_text" in said
    assert "calibrating on 'mini_prompts'" in said and "first / second: parameters 0.8" in said
    assert said.count("is not installed and this needs it") == 2  # a name that is given is never replaced
    facts = json.loads((tmp_path / "a" / "pruning.json").read_text())
    assert facts["arguments"]["calibration"] == "mini_prompts" and facts["measured"]["pruned"]["text"] == "mini_text"
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not (tmp_path / "c").exists()


def test_reconstruction_is_part_of_the_core_and_the_card_says_no_commit_of_another_repository(bare, model, tmp_path):
    arguments = ["--model", model, "--removed-fraction", "0.1", "--calibration", "mini_prompts", "--prompts", "4",
                 "--text", "none", "--reconstruct", "sequential", "--reconstruction-text", "mini_calibration_text"]
    run(bare, tmp_path, "pruning-lib", "prune", *arguments, "--out", "a", path=os.environ["PATH"])
    blocks = ["prune", "--model", model, "--method", "none", "--criterion", "cka", "--text", "none",
              "--blocks-removed", "1", "--calibration", "mini_prompts", "--prompts", "4", "--out", "c"]
    walk(bare, tmp_path, [["prune", *arguments, "--out", "b"], blocks])  # no git at all
    for name in "ab":
        assert json.loads((tmp_path / name / "pruning.json").read_text())["made_with"]["commit"] == "unknown"
        card = (tmp_path / name / "README.md").read_text()
        assert "(commit" not in card and f"Made with pruning_lib {PROJECT['version']}," in card


@pytest.mark.parametrize(("extra", "command"), [
    ("eval", "evaluate MODEL --text mini_text --tasks mini"), ("report", "run --all"), ("report", "book"),
    ("gguf", "export MODEL --out x.gguf"), ("vision", "inspect resnet18"),
    ("recovery", "prune --model MODEL --out x --removed-fraction 0.1 --calibration mini_prompts --text none "
                 "--recover mini_prompts")])
def test_what_an_extra_brings_is_asked_for_by_its_name(bare, model, tmp_path, extra, command):
    words = [str(model) if word == "MODEL" else word for word in command.split()]
    assert f"pruning-lib[{extra}]" in run(bare, tmp_path, "pruning-lib", *words, code=1)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
