"""Drawings of the book equal the output of their scripts and agree with records; links follow one setting."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from pruning_lib.pruning import similarity

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


head_map, methods, growth, speed, concepts = (script(BOOK / "drawings" / f"{name}.py")
                                              for name in ("head_map", "methods", "growth", "speed", "concepts"))
addresses, alt_text, number_format = (script(BOOK / "extensions" / f"{name}.py")
                                      for name in ("addresses", "alt_text", "number_format"))
MAP = json.loads((BOOK / "drawings" / "head_map.json").read_text())


def test_the_map_is_drawn_from_what_was_measured_and_that_agrees_with_the_record():
    assert (BOOK / "drawings" / "head_map.html").read_text() == head_map.draw(MAP)
    record = json.loads((ROOT / "data" / "results" / f"{MAP['run']}.json").read_text())
    for key, value in MAP["made"].items():  # in half precision, on another number of threads
        assert value == pytest.approx(record["values"][key], rel=0.01)


def test_the_plans_of_the_map_take_the_least_important_parts():
    assert [len(block) for block in MAP["heads"]] == [9] * 30
    for number, gone in MAP["gone"].items():
        for block, heads in enumerate(gone):
            assert len(heads) == int(number)
            groups = [sum(MAP["heads"][block][3 * g:3 * g + 3]) for g in range(3)]
            least = sorted(range(3), key=groups.__getitem__)[:int(number) // 3]
            assert {head // 3 for head in heads} == set(least)
    for steps in MAP["steps"].values():
        assert [round(100 * step[2]) for step in steps] == list(range(51))


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_picture_of_a_method_is_what_its_script_draws_and_stands_in_its_chapter(name):
    assert (BOOK / "drawings" / f"{name}.html").read_text() == methods.draw(name)
    assert f":drawing: {name}.html" in (BOOK / "chapters" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", concepts.CONCEPTS)
def test_the_drawing_of_a_concept_is_what_its_script_draws_and_stands_numbered_in_a_chapter(name):
    assert (BOOK / "drawings" / f"{name}.svg").read_text() == concepts.draw(name)
    assert sum(f":drawing: {name}.svg" in path.read_text() for path in (BOOK / "chapters").glob("*.md")) == 1


def test_the_drawings_show_the_numbers_of_the_worked_examples():
    assert {"mean 3", "mean 1.5"} <= set(re.findall(r">(mean [\d.]+)<", concepts.draw("head_adds")))
    assert re.findall(r"squared error (\d+)", concepts.draw("least_squares")) == ["0", "152", "8"]
    assert re.findall(r">(L\d [\d.]+): removed<", concepts.draw("norms")) == ["L1 3", "L2 2"]
    assert re.findall(r"squared distance (\d+)", concepts.draw("bures")) == ["5", "2"]
    assert re.findall(r">sum (\d+)(: removed)?<", concepts.draw("votes")) == [("3", ""), ("2", ": removed"), ("5", ""),
                                                                             ("8", "")]


def test_the_metrics_see_and_ignore_the_changes_as_drawn():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor([3.0, 1.0])
    labels = (x[:, 0] > 3).long()
    turned, doubled, sheared = x @ torch.tensor([[0.0, 1], [-1, 0]]).double(), 2 * x, x @ torch.tensor(
        [[1.0, 0], [0.9, 1]]).double()

    def distance(name, y):
        return similarity.METRICS[name].distance(x, y, labels)

    for name, y in (("cka", turned), ("cka", doubled), ("linear_shape_0", sheared)):
        assert distance(name, y) == pytest.approx(0, abs=1e-6)
    for name, y in (("permutation", turned), ("gaussian_2", doubled), ("cka", sheared)):
        assert distance(name, y) > 0.01


# --- how cost grows ---------------------------------------------------------------------------------------------------


def test_words_and_curves_of_how_cost_grows_are_those_of_the_table_that_was_measured():
    points, conditions = growth.read()
    assert growth.WORDS.read_text() == growth.words(points, conditions)
    assert Image.open(growth.CURVES).text["Description"] == growth.digest()
    assert {"tokens", "blocks", "prompts", "width"} <= set(points) <= set(growth.KINDS)
    missing = [name for kind, name in growth.KINDS.items() if kind not in points]
    assert growth.WORDS.read_text().count("Not measured here yet") == bool(missing)


def test_words_and_curves_of_the_speed_are_those_of_the_table_that_was_measured():
    rows, conditions = speed.read()
    assert speed.WORDS.read_text() == speed.words(rows, conditions)
    assert Image.open(speed.CURVES).text["Description"] == speed.digest()
    assert "peak" in conditions and len({row[0] for row in rows}) == 6
    assert all(ours > floor for _, _, _, ours, _, floor, _ in rows), "faster than arithmetic"


def test_the_table_of_speed_has_the_largest_size_of_every_computation():
    rows = [["tasks", 4, "questions", 1.0, 2.0, 0.5, 10.0], ["tasks", 16, "questions", 2.0, 5.0, 1.0, 20.4]]
    *_, row, _, last = speed.words(rows, "measured on a machine").splitlines()
    assert row == "| tasks | 16 questions | 2.00 | 5.00 | 2.50 | 1.00 | 2.0 | 20 |"
    assert last == "Measured on a machine."


def test_a_bend_is_told_from_noise_and_named_with_its_place_and_direction():
    square = [(n, 0.1 + (n / 100) ** 2, 0.0) for n in (1, 10, 100, 1000)]
    noisy = [(n, n * noise, n * 2.0) for n, noise in ((1, 1.0), (2, 1.05), (4, 1.0), (8, 1.05))]
    cores = [(1, 80.0, 500.0), (2, 40.0, 1000.0), (4, 40.0, 2000.0)]
    assert [number for number, *_ in growth.bends(square)] == [10, 100] and not growth.bends(noisy)
    assert growth.exponents(cores) == pytest.approx([-1, 0])
    said = growth.words({"prompts": noisy, "workers": cores}, "measured on a machine").splitlines()
    assert "| prompts | 1 to 8 | 1.02 | 1.07, 0.93, 1.07 | none | 2 to 16 MB, power 1.00 |" in said
    assert "| workers, rows at a time | 1 to 4 | -0.50 | -1.00, 0.00 | up at 2 | 500 to 2000 MB, power 1.00 |" in said
    assert said[-1] == "Not measured here yet: tokens of a prompt; blocks; parameters, by width."


# --- links ------------------------------------------------------------------------------------------------------------

REPOSITORY = "https://github.com/Someone/pruning"


def test_without_a_repository_there_are_no_buttons_and_with_one_all_of_them():
    assert not any(addresses.options("").values())
    known = addresses.options(REPOSITORY)
    assert all(known[button] is True for button in addresses.BUTTONS)
    assert known["launch_buttons"]["binderhub_url"] and known["launch_buttons"]["colab_url"]


def test_the_address_of_the_site_follows_from_the_repository():
    assert addresses.site(REPOSITORY) == "https://someone.github.io/pruning/"
    assert addresses.site("") == addresses.site("https://example.org/x/y") == ""


def test_edit_links_lead_to_the_notebook_and_not_to_the_page_made_of_it():
    page = f"{REPOSITORY}/edit/main/book/executed/amp-20.ipynb"
    buttons = [{"buttons": [{"label": "source-edit-button", "url": page},
                            {"label": "source-issues-button", "url": f"{REPOSITORY}/issues"}]}]
    addresses.lead_to_source(buttons, "executed/amp-20.ipynb", "amp_prune")
    assert [b["url"] for b in buttons[0]["buttons"]] == [f"{REPOSITORY}/edit/main/notebooks/amp_prune.ipynb",
                                                         f"{REPOSITORY}/issues"]


def test_a_page_names_its_repository_only_where_there_is_one():
    assert "git+" not in addresses.run_it("x.ipynb", "amp-20", "")
    assert f"git+{REPOSITORY}" in addresses.run_it("x.ipynb", "amp-20", REPOSITORY)


def test_the_address_of_the_repository_stands_in_one_place():
    url = yaml.safe_load((BOOK / "_config.yml").read_text())["repository"]["url"]
    asked = ["git", "grep", "-l", "-F", url or REPOSITORY]  # while the address is empty, no file may contain one
    files = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if files.returncode > 1:
        pytest.skip("not a git checkout; a clone has this test")
    assert set(files.stdout.split()) <= {"book/_config.yml", "tests/report/test_drawings.py"}


def test_a_book_with_a_repository_has_edit_source_and_launch_links_and_an_absolute_card(tmp_path):
    """Build two pages with an address; another test covers the empty address of the published book."""
    shutil.copytree(BOOK, tmp_path / "book", ignore=shutil.ignore_patterns("executed", "chapters", "_build"))
    for name in ("chapters/references.md", "executed/by_hand.ipynb"):
        (tmp_path / "book" / name).parent.mkdir()
        shutil.copyfile(BOOK / name, tmp_path / "book" / name)
    config = (tmp_path / "book" / "_config.yml").read_text()
    assert config.count('url: ""') == 1
    (tmp_path / "book" / "_config.yml").write_text(config.replace('url: ""', f"url: {REPOSITORY}"))
    (tmp_path / "book" / "_toc.yml").write_text("format: jb-book\nroot: chapters/references\n"
                                                "chapters: [file: executed/by_hand]\n")
    builder = Path(sys.executable).with_name("jupyter-book")
    done = subprocess.run([builder, "build", tmp_path / "book", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    html = tmp_path / "book" / "_build" / "html"
    page, chapter = ((html / f"{name}.html").read_text() for name in ("executed/by_hand", "chapters/references"))
    for link in (f"{REPOSITORY}/edit/main/notebooks/by_hand.ipynb", f"git+{REPOSITORY}",
                 "https://mybinder.org/v2/gh/Someone/pruning/main?urlpath=lab/tree/book/executed/by_hand.ipynb",
                 "https://colab.research.google.com/github/Someone/pruning/blob/main/book/executed/by_hand.ipynb",
                 'content="https://someone.github.io/pruning/_static/card.png"'):
        assert link in page
    assert f"{REPOSITORY}/edit/main/book/chapters/references.md" in chapter


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before, after", [
    ("79.0% of 30 %", "79.0\u00a0% of 30\u00a0%"), ("lost -1.5 [-2, -0.3]", "lost \u22121.5 [\u22122, \u22120.3]"),
    ("amp-20, 2026-01-02, 3-7 and e-5", "amp-20, 2026-01-02, 3-7 and e-5")])
def test_numbers_have_one_format_and_names_stay(before, after):
    assert number_format.formatted(before) == after


def test_numbers_of_tables_are_formatted_but_no_style():
    html = "<style>#T_1 td { width: 50%; margin: -1px }</style><table id='T_1' style='width: 9%'><td>-3.1%</td></table>"
    assert number_format.table(html) == html.replace("-3.1%", "\u22123.1\u00a0%")
    head = "<table><thead><th>idle_w</th><th>tokens_per_s</th></thead>"
    row = "<th>top_k</th><td>-12664.4</td><td>1999</td>"
    assert number_format.table(head + row) == head.replace("idle_w", "idle, W").replace("_", " ") + row.replace(
        "-12664.4", "\u221212,664.4").replace("1999", "1,999")


# --- words for figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prose, said", [("How to read it. Each row is a block. More.", "Each row is a block."),
                                         ("No full stop", "No full stop"), ("Which one?\nThis.", "Which one?")])
def test_a_figure_is_described_by_the_first_sentence_that_says_something(prose, said):
    assert alt_text.first_sentence(prose) == said


def test_a_caption_goes_before_prose_and_a_given_text_before_both():
    from docutils import nodes
    doctree = nodes.section("", nodes.title("", "Heads"), nodes.paragraph("", "Each row is a block."))
    plain, given, captioned = nodes.image(), nodes.image(alt="mine"), nodes.image()
    doctree += [plain, given, nodes.image(), nodes.figure("", captioned, nodes.caption("", "A map. More."))]
    alt_text.describe(SimpleNamespace(), doctree, "page")
    texts = [image["alt"] for image in doctree.findall(nodes.image)]
    assert texts == ["Figure, Heads: Each row is a block.", "mine", "Figure, Heads: Each row is a block. (2)",
                     "Figure, Heads: A map."]
    assert not re.search(r"\d{5}", "".join(texts))
