"""A page is carried over a change of code only where the code is the same but for names, or a witness shows it."""

import json
import shutil

import nbformat
import pytest
import yaml
from test_execution import edit, executed, make_tree  # noqa: F401  (a fixture among them)

from pruning_lib.experiments import carry_over, code_digests, records, staleness
from pruning_lib.experiments.runs import Tree, rows


@pytest.fixture
def pair(executed, tmp_path):  # noqa: F811
    """Return a tree whose row ``small`` is stale after a change, and the tree as it was before."""
    root = executed.notebooks.parent
    for name in ("now", "before"):
        shutil.copytree(root, tmp_path / name)
    (tmp_path / "before" / "pruning_lib").symlink_to(code_digests.PACKAGE)
    return Tree.at(tmp_path / "now"), Tree.at(tmp_path / "before")


def change(tree, old, new):
    edit(tree.notebooks / "tiny.ipynb", lambda read: [cell.update(source=cell.source.replace(old, new))
                                                      for cell in read.cells])


def why(tree):
    return staleness.staleness_of(rows(tree)["small"], tree).why


def carried(pair, *more):
    now, before = pair
    return carry_over.main(["small", "--root", str(now.notebooks.parent), "--before", str(before.notebooks.parent),
                            *more]) == 0


def page(tree):
    return nbformat.read(tree.pages / "small.ipynb", as_version=4)


def test_renamed_code_is_carried_over_with_todays_code_around_the_outputs_and_says_how(pair, tmp_path):
    now, _ = pair
    outputs = [cell.get("outputs") for cell in page(now).cells]
    change(now, 'print("count is"', 'show = print\nshow("count is"')
    assert why(now) and not carried(pair)
    change(now, 'show = print\nshow("count is"', '# a remark\nprint("count is"')
    edit(now.pages / "small.ipynb", lambda read: read.metadata["pruning_lib"]["code"].update(gone="0" * 8))
    assert why(now) == "code changed: gone"
    assert carried(pair) and not why(now)
    assert page(now).metadata["pruning_lib"]["carried_over"] == "same code but for names"
    assert [cell.get("outputs") for cell in page(now).cells] == outputs
    assert any("# a remark" in cell.source for cell in page(now).cells)


@pytest.mark.parametrize(("after", "expected"), [
    ({"twice": 2.0, "took_s": 5.0, "more": 1}, True), ({"twice": 2.5, "took_s": 1.0}, False), ({"took_s": 1.0}, False)])
def test_a_witness_with_equal_numbers_carries_its_row_over_whatever_the_times(pair, tmp_path, after, expected):
    now, _ = pair
    change(now, "2 * fraction", "fraction + fraction")
    for folder, values in (("old", {"twice": 2.0, "took_s": 1.0}), ("new", after)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tiny.json").write_text(json.dumps({"values": values, "rows": [], "items": {}}))
    assert carried(pair, "--witness", str(tmp_path / "old"), str(tmp_path / "new")) == expected
    assert bool(why(now)) != expected


def test_names_of_parameters_keys_and_values_are_renamed_in_record_and_page(pair, tmp_path):
    now, before = pair
    change(now, "count = 3", "number = 3")
    change(now, '"count is", count', '"count is", number')
    change(now, '"twice"', '"double"')
    table = yaml.safe_load((now.notebooks / "runs.yml").read_text())
    table["small"]["parameters"] = {"fraction": 1, "number": 7}
    (now.notebooks / "runs.yml").write_text(yaml.safe_dump(table, sort_keys=False))
    (tmp_path / "names.yml").write_text(yaml.safe_dump({"*.count": "number", "*.twice": "double", "=twice": "double"}))
    old = records.contents(before.records / "small.json")
    assert carried(pair, "--names", str(tmp_path / "names.yml")) and not why(now)
    new = records.contents(now.records / "small.json")
    assert new["values"] == {"double": old["values"]["twice"]} and new["parameters"]["number"] == 7
    assert records.checksum_ok(new) and page(now).metadata["pruning_lib"]["parameters"]["number"] == 7
