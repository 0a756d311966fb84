"""Prose is spelt right, and British throughout: chapters, notebooks, the files beside them."""

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PROSE = [*sorted((ROOT / "book" / "chapters").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb")),
         *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "book/slides.yml"))]
OURS = {"re-uses", "notin"}  # with a hyphen on purpose; a class of ast
NAMES = {"math", "program", "story"}  # of a directive; of a computer; that is told: British too


def words_of(path):
    """The prose of a file without code, formulas, addresses and names of things."""
    text = path.read_text() if path.suffix != ".ipynb" else "\n\n".join(
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    text = re.sub(r"^(`{3,})(?:python|yaml|text|json).*?^\1", "", text, flags=re.M | re.S)
    return re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]*`|\]\([^)]*\)|https?://\S+", " ", text, flags=re.S)


def misspelt(texts, folder):
    """What codespell finds in texts (name -> text), as lines."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare,informal", "--ignore-words-list",
               ",".join(OURS), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.splitlines()


def american(text):
    """Words of a text that are spelt otherwise in British English."""
    lines = resources.files("codespell_lib").joinpath("data/dictionary_en-GB_to_en-US.txt").read_text().splitlines()
    spelt = {other.strip(): line.partition("->")[0] for line in lines for other in line.partition("->")[2].split(",")}
    return {word: spelt[word.lower()] for word in re.findall(r"[A-Za-z]+", text) if word.lower() in {*spelt} - NAMES}


def test_prose_is_spelt_right(tmp_path):
    assert not misspelt({f"{path.parent.name}-{path.stem}.txt": words_of(path) for path in PROSE}, tmp_path)


def test_docstrings_and_comments_are_spelt_right(tmp_path):
    assert not misspelt({path.name: path.read_text() for path in (ROOT / "pruning_lib").rglob("*.py")}, tmp_path)


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_spelling_is_british_throughout(path):
    assert not american(words_of(path))


def test_a_mistake_would_be_found(tmp_path):
    assert len(misspelt({"a.txt": "The seperate blocks\nare definately occuring."}, tmp_path)) == 3
    assert american("The color of a normalized neighbor") == {"color": "colour", "normalized": "normalised",
                                                              "neighbor": "neighbour"}
