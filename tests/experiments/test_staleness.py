"""A changed provenance makes a row stale, with a reason; pages without provenance stay valid."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from test_execution import edit, executed, make_tree  # noqa: F401  (a fixture among them)

from pruning_lib.cli import main
from pruning_lib.cli import run as run_command
from pruning_lib.experiments import code_digests, input_digests, records, staleness
from pruning_lib.experiments.runs import Tree, rows
from pruning_lib.experiments.staleness import MADE_BEFORE, staleness_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(executed, tmp_path):  # noqa: F811
    """Return a copy of a tree after real runs of ``small`` and ``look``."""
    return Tree.at(shutil.copytree(executed.notebooks.parent, tmp_path / "copy"))


def why(tree, name="small"):
    return staleness_of(rows(tree)[name], tree).why


def page_of(tree, name="small"):
    return nbformat.read(tree.pages / f"{name}.ipynb", as_version=4).metadata["pruning_lib"]


def stamp(tree, name, **changed):
    edit(tree.pages / f"{name}.ipynb", lambda page: page.metadata["pruning_lib"].update(changed))


def test_a_page_says_what_it_was_made_from(tree):
    made = page_of(tree)
    assert set(made) == {"fingerprint", "code", "inputs", "record", "row", "notebook", "parameters"}
    assert made["record"] == json.loads((tree.records / "small.json").read_text())["checksum"]
    assert not why(tree) and staleness_of(rows(tree)["small"], tree).code_known
    assert "experiments.records.read" in page_of(tree, "look")["code"]


def test_other_code_beneath_makes_a_row_stale_and_is_named(tree, monkeypatch):
    code = {"amp.importance": "1" * 8, "amp.head_scores": "2" * 8}
    monkeypatch.setattr(code_digests, "digests", lambda cells: code)
    stamp(tree, "small", code={**code, "amp.head_scores": "0" * 8})
    assert why(tree) == "code changed: amp.head_scores"
    stamp(tree, "small", code={name: "0" * 8 for name in ("amp.a", "amp.b", "amp.c", "amp.d", "amp.e")})
    assert why(tree) == "code changed: amp.a, amp.b, amp.c and 2 more"


def test_how_results_are_drawn_stored_and_waited_for_makes_readings_stale_and_no_run(tree):
    assert not [name for name in page_of(tree)["code"] if name.startswith(staleness.NO_NUMBERS)]
    stamp(tree, "small", code={**page_of(tree)["code"], "_locks.lock": "0" * 8})  # an older page has more entries
    assert not why(tree)
    stamp(tree, "look", code={"experiments.records.read": "0" * 8})
    assert why(tree, "look") == "code changed: experiments.records.read"


def test_a_row_whose_inputs_changed_is_stale_and_says_which(tree, monkeypatch):
    stamp(tree, "small", inputs={"amp.jsonl": "0" * 16, "c4 in PRUNING_DATA": "0" * 16})
    now = {"amp.jsonl": "0" * 16, "c4 in PRUNING_DATA": "1" * 16}
    monkeypatch.setattr(input_digests, "digests_of", lambda row, tree: now)
    assert why(tree) == "inputs changed: c4 in PRUNING_DATA"


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"\x00", b"1" * 5000, b"[" * 100_000, b"\xff\xfe"])
def test_a_record_that_cannot_be_read_makes_its_row_stale_and_the_readings(tree, damaged):
    (tree.records / "small.json").write_bytes(damaged)
    assert why(tree) == "the record cannot be read"
    assert why(tree, "look") == "notebook or a record changed"


def test_a_checksum_that_was_taken_out_of_a_record_is_missed(tree):
    path = tree.records / "small.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}))
    assert why(tree) == "the record was edited after it was written"


@pytest.mark.parametrize("change", [
    {"values": {"twice": 3}}, {"values": {"twice": float("nan")}}, {"parameters": {}}, {"checksum": "0" * 16},
    {"checksum": None}, {"note": "mine"}])
def test_a_record_edited_by_hand_is_noticed_here_and_by_whoever_reads_it(tree, change, monkeypatch):
    path = tree.records / "small.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert why(tree) == "the record was edited after it was written"
    monkeypatch.setenv("PRUNING_RESULTS", str(tree.records))
    with pytest.raises(ValueError, match="small.json is not a record as it was written: it was edited; run small"):
        records.read("small")


def test_layout_and_order_of_a_record_do_not_matter(tree, monkeypatch):
    path = tree.records / "small.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    monkeypatch.setenv("PRUNING_RESULTS", str(tree.records))
    assert not why(tree) and records.read("small")["values"] == {"twice": 2}


def test_a_page_and_a_record_of_different_runs_are_noticed(tree):
    path = tree.records / "small.json"
    record = {**json.loads(path.read_text()), "values": {"twice": 3}}
    path.write_text(json.dumps({**record, "checksum": records.checksum(record)}))
    assert why(tree) == "page and record are of different runs"


def test_a_page_that_cannot_be_read_makes_its_row_stale(tree):
    edit(tree.pages / "small.ipynb", lambda page: page.metadata.update(pruning_lib="something"))
    assert "the page cannot be read" in why(tree)
    (tree.pages / "small.ipynb").write_text('{"cells": [')
    assert "the page cannot be read" in why(tree)


def test_rows_of_before_are_not_stale_and_status_says_that_their_code_is_not_known(tree, capsys):
    def strip(page):
        for key in ("code", "inputs", "record"):
            del page.metadata["pruning_lib"][key]

    edit(tree.pages / "small.ipynb", strip)
    path = tree.records / "small.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}))
    stamp(tree, "look", fingerprint=staleness.fingerprint(rows(tree)["look"], tree))
    root = ["--root", str(tree.notebooks.parent)]
    assert staleness_of(rows(tree)["small"], tree) == staleness.Staleness("", code_known=False)
    assert main.main(["status", *root]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split(maxsplit=1) == ["small", "up to date"]
    assert said.err == f"{MADE_BEFORE}: small. To run them again: pruning-lib run --all --stale-code\n"
    small = rows(tree)["small"]
    assert run_command._why(small, tree) == "" and run_command._why(small, tree, True) == MADE_BEFORE


def test_every_record_of_the_report_is_as_it_was_written():
    tree = Tree.at(ROOT)
    made = [row for row in rows(tree).values() if tree.page(row).is_file()]
    assert made and not {row.name: found for row in made if (found := staleness.corruption(row, tree))}
