"""The list of all runs: titles say what varies, and every line is true to its row and to the code of the readings."""

from pathlib import Path

import pytest

from pruning_lib.experiments import runs
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.report import run_index

ROOT = Path(__file__).resolve().parents[2]
TREE = Tree.at(ROOT)
ROWS = list(runs.rows(TREE).values())
MADE = [row for row in ROWS if not row.reading and TREE.page(row).is_file()]


@pytest.fixture(scope="module")
def lines():
    table = run_index.table(MADE, ROWS, TREE, ROOT / "book" / "chapters" / "claims.md").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_run_has_one_line_with_all_columns(lines):
    assert tuple(lines[0]) == run_index.COLUMNS and {len(line) for line in lines} == {len(run_index.COLUMNS)}
    assert [line[0].split("]")[0].lstrip("[") for line in lines[2:]] == [row.name for row in MADE]


def test_a_line_names_model_method_size_reader_and_claim(lines):
    line = next(line for line in lines if line[0].startswith("[zero-shot-amp-30]"))
    assert line[2:5] == ["smollm2-135m-instruct", "amp", "30 %"]
    assert "[zero_shot_reasoning](../executed/zero_shot_reasoning.ipynb)" in line[5]
    assert "30 % removed with little loss in zero-shot accuracy" in line[6]


def test_titles_differ_and_name_the_row_and_what_varies():
    titles = run_index.titles(MADE, TREE)
    assert set(titles) == {row.name for row in MADE} and len(set(titles.values())) == len(MADE)
    assert titles["amp-20"] == "amp-20: Pruning one model to one size (20 % removed, heads removed 0)"


def test_only_parameters_with_several_values_vary_and_the_telling_ones_come_first():
    rows = [Row("a", "n", {}), Row("b", "n", {}), Row("c", "other", {})]
    given = {"a": {"x": 1, "seed": 0, "method": "amp", "y": 2}, "b": {"x": 2, "seed": 1, "method": "flap", "y": 2},
             "c": {"x": 9}}
    assert run_index.varying(rows, given) == {"n": ["method", "seed", "x"], "other": []}


@pytest.mark.parametrize(("key", "value", "words"), [
    ("removed_fraction", 0.125, "12.5 % removed"), ("heads_removed", "same_share", "same share of heads"),
    ("method", "activation_norm", "method activation norm"), ("model", "org/phi-1_5", "model org/phi-1_5")])
def test_a_setting_is_written_in_words(key, value, words):
    assert run_index.setting(key, value) == words


def test_settings_that_are_off_or_long_are_left_out():
    given = {"method": "none", "blocks_removed": 0, "seed": 0, "runs": "a" * 99, "prompts": 12}
    assert run_index.settings(given, given) == ["seed 0", "prompts 12"]


def test_a_run_on_networks_of_other_runs_has_the_model_of_the_first():
    others = {"dense": {"model": "resnet20"}, "cut": {"model": "resnet56"}}
    assert run_index.model_of({"runs": "dense cut"}, others) == "resnet20"
    assert run_index.method_of({"method": "none", "criterion": "block_influence"}) == "block influence"


def test_every_row_that_was_not_run_is_listed_with_what_it_needs():
    lines = run_index.waiting(ROWS, TREE).splitlines()[2:]
    wanted = [row for row in ROWS if row.not_run]
    assert wanted and [line.split("`")[1] for line in lines] == [row.name for row in wanted]
    assert all(line.endswith(f"| {row.not_run} |") for line, row in zip(lines, wanted, strict=True))
    assert "```{include} ../_waiting.md" in (ROOT / "book" / "chapters" / "records.md").read_text()
