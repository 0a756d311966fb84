"""A page is carried over a change of code only where the code is the same but for names, or a witness shows it."""

import json
import shutil

import nbformat
import pytest
import yaml
from test_execution import edit, executed, make_tree  # noqa: F401  (a fixture among them)

from pruning_lib.experiments import carry_over, code_digests, records, runs, staleness
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


def test_renamed_code_is_carried_over_with_todays_code_around_the_outputs_and_says_how(pair):
    now, _ = pair
    outputs = [cell.get("outputs") for cell in page(now).cells]
    change(now, 'print("count is"', 'show = print\nshow("count is"')
    assert why(now) and not carried(pair)
    change(now, 'show = print\nshow("count is"', '# a remark\nprint("count is"')
    change(now, "import sys", "from sys import stderr as file")
    change(now, "sys.stderr", "file")
    assert why(now) and not carried(pair)
    for tree in pair:  # as if the page had been made with the other name
        change(tree, "import sys", "from sys import stderr")
        change(tree, "sys.stderr", "stderr")
    fresh = staleness.fingerprint(rows(pair[1])["small"], pair[1])
    edit(now.pages / "small.ipynb", lambda read: read.metadata["pruning_lib"].update(fingerprint=fresh))
    assert carried(pair, "--names", names_in(pair, {"*.stderr": "file"})) and not why(now)
    assert page(now).metadata["pruning_lib"]["carried_over"] == "same code but for names"
    assert [cell.get("outputs") for cell in page(now).cells] == outputs
    assert any("# a remark" in cell.source for cell in page(now).cells)


def test_a_notebook_that_was_another_before_stays_stale(pair):
    now, _ = pair
    edit(now.pages / "small.ipynb", lambda read: read.metadata["pruning_lib"].update(fingerprint="of another notebook"))
    assert why(now) == "notebook or parameters changed" and not carried(pair) and why(now)


def names_in(pair, names):
    path = pair[0].notebooks.parent / "names.yml"
    path.write_text(yaml.safe_dump(names))
    return str(path)


def with_helper(tree, body):
    """Give a tree a package of its own, in which the notebook uses a function with this body."""
    package = tree.notebooks.parent / "pruning_lib"
    package.unlink(missing_ok=True)
    (package / "pruning").mkdir(parents=True, exist_ok=True)
    for place in (package / "__init__.py", package / "pruning" / "__init__.py"):
        place.write_text("")
    (package / "pruning" / "helper.py").write_text(
        f"def doubled(x):\n    return {body}\n\n\ndef other(x):\n    return x\n")


CELL = "from pruning_lib.pruning import helper\nhelper.doubled(helper.other(1))"


@pytest.mark.parametrize("stale", [None, "pruning.helper.other", "pruning.helper.doubled"])
@pytest.mark.parametrize("made_there", [False, True])
def test_a_definition_that_was_stale_before_stays_stale_whatever_a_witness_shows(pair, monkeypatch, stale, made_there):
    """Only a page that was made at the very commit of the witness needs no equal digests there."""
    row, stored = rows(pair[0])["small"], {}
    for tree, body in zip(pair, ("x + x", "2 * x"), strict=True):
        with_helper(tree, body)
        edit(tree.notebooks / "tiny.ipynb", lambda read: read.cells[2].update(source=f"{CELL}\n{read.cells[2].source}"))
        package = tree.notebooks.parent / "pruning_lib"
        stored[tree] = code_digests.digests(staleness.code_cells(runs.source(row, tree)), package)
    monkeypatch.setattr(staleness, "code_of", lambda row, tree: staleness.relevant(stored[tree], row))
    made = {**staleness.relevant(stored[pair[1]], row), **({stale: "0" * 8} if stale else {})}
    edit(pair[0].pages / "small.ipynb", lambda read: read.metadata["pruning_lib"].update(
        code=made, fingerprint=staleness.fingerprint(row, pair[1])))
    monkeypatch.setattr(carry_over, "_made_at", lambda record, package: made_there)
    witness = []
    for folder in ("old", "new"):
        witness.append(pair[0].notebooks.parent / folder)
        witness[-1].mkdir()
        (witness[-1] / "tiny.json").write_text(json.dumps({"values": {"twice": 2.0}, "rows": [], "items": {}}))
    assert "pruning.helper.doubled" in why(pair[0])
    assert not carried(pair) and "pruning.helper.doubled" in why(pair[0])
    fresh = stale is None or made_there
    assert carried(pair, "--witness", *map(str, witness)) == fresh
    assert why(pair[0]) == ("" if fresh else f"code changed: {stale}")


def test_a_row_whose_default_changed_is_not_taken_for_one_of_today(pair, tmp_path):
    now, _ = pair
    change(now, 'name = "amp"', 'name = "random"')
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tiny.json").write_text(json.dumps({"values": {"twice": 2.0}, "rows": [], "items": {}}))
    witness = "--witness", str(tmp_path / "old"), str(tmp_path / "new")
    record = records.contents(now.records / "small.json")
    assert record["parameters"]["name"] == "amp" and not carried(pair, *witness) and why(now)


def test_an_edited_record_is_not_blessed(pair):
    now, _ = pair
    path = now.records / "small.json"
    record = records.contents(path)
    path.write_text(json.dumps({**record, "values": {"twice": 3.0}}))
    assert "edited" in why(now) and not carried(pair) and "edited" in why(now)


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
    (given,) = [cell.source for cell in page(now).cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert [line for line in given.splitlines() if "=" in line] == ["fraction = 1", "number = 7"]
    new = records.contents(now.records / "small.json")
    assert new["values"] == {"double": old["values"]["twice"]} and new["parameters"]["number"] == 7
    assert records.checksum_ok(new) and page(now).metadata["pruning_lib"]["parameters"]["number"] == 7
