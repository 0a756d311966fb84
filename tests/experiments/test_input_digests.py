"""Input files of a row are found through its parameters and cells and compared by content, cheaply."""

import hashlib
import os
import shutil

import pandas as pd
import pytest
from test_execution import make_tree, notebook

from pruning_lib import data
from pruning_lib.cli import main
from pruning_lib.cli import run as run_command
from pruning_lib.data import images
from pruning_lib.experiments import input_digests, records, runs
from pruning_lib.experiments.runs import Row
from pruning_lib.models import loading


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "root")


def named(text):
    """Return a row with a parameter of this value."""
    return Row("small", "tiny", {"name": text})


@pytest.fixture
def lent(tmp_path, monkeypatch):
    """Return local folders of data sets and models, as set by a user."""
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path / "lent"))
    monkeypatch.setenv("PRUNING_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    return tmp_path / "lent"


def write_c4(lent, text="some words"):
    folder = lent / data.DATASETS["c4"].folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"text": [text]}).to_parquet(folder / "train-0.parquet")
    return folder


def test_files_of_the_tree_count_when_a_parameter_or_a_cell_names_them(tree):
    folder = tree.notebooks.parent / "data" / "inputs"
    folder.mkdir(parents=True)
    for name in ("amp.jsonl", "figures.json", "other.json"):
        (folder / name).write_text("1")
    notebook(tree.notebooks / "look.ipynb", "# Look", 'open("figures.json")')
    # the notebook's own value is "amp"
    assert set(input_digests.digests_of(Row("small", "tiny", {}), tree)) == {"amp.jsonl"}
    look = Row("look", "look", {}, reading=True)
    before = input_digests.digests_of(look, tree)
    assert set(before) == {"figures.json"}
    (folder / "figures.json").write_text("2")
    assert input_digests.changed(before, input_digests.digests_of(look, tree)) == ["figures.json"]
    (folder / "figures.json").unlink()
    assert input_digests.changed(before, input_digests.digests_of(look, tree)) == ["figures.json"]


@pytest.mark.parametrize("place", ["path", "lent"])
def test_a_model_counts_with_every_file_of_its_folder(tree, tmp_path, lent, place):
    folder = tmp_path / "models" / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("1")
    row = named(str(folder) if place == "path" else "mine")
    name = str(folder) if place == "path" else "mine in PRUNING_MODELS"
    before = input_digests.digests_of(row, tree)
    assert set(before) == {name} and loading.find(row.parameters["name"]) == str(folder)
    for file, text in (("model.safetensors", "2"), ("config.json", "{ }"), ("tokenizer.json", "")):
        (folder / file).write_text(text)
        assert input_digests.changed(before, input_digests.digests_of(row, tree)) == [name]
        before = input_digests.digests_of(row, tree)


def test_a_data_set_that_is_lent_counts_and_one_that_is_not_at_hand_says_nothing(tree, lent, monkeypatch):
    assert input_digests.digests_of(named("c4"), tree) == {}  # no folder: it would come from the hub
    write_c4(lent)
    before = input_digests.digests_of(named("c4"), tree)
    assert set(before) == {"c4 in PRUNING_DATA"} and data.texts("c4") == ["some words"]
    write_c4(lent, "other words")
    assert input_digests.changed(before, input_digests.digests_of(named("c4"), tree)) == ["c4 in PRUNING_DATA"]
    for elsewhere in ("", str(lent / "nowhere")):
        monkeypatch.setenv("PRUNING_DATA", elsewhere)
        assert input_digests.changed(before, input_digests.digests_of(named("c4"), tree)) == []


def test_every_set_that_can_be_lent_is_looked_for_where_it_is_read(tree, lent):
    folders = {name: entry.folder for name, entry in data.DATASETS.items() if entry.folder}
    for name, folder in {**folders, **input_digests.IMAGE_FOLDERS}.items():
        (lent / folder / "data").mkdir(parents=True)
        assert set(input_digests.digests_of(named(name), tree)) == {f"{name} in PRUNING_DATA"}
        read = images.load if name in images.IMAGES else data.texts
        with pytest.raises(ValueError, match=f"{folder}.data has no "):  # this folder is read
            read(name, "test") if read is images.load else read(name)


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path, cache, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(bytes(2 * input_digests.SMALL_BYTES))
    reads, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: reads.append(1) or real(*args))
    first = input_digests.digest_of(path)
    assert input_digests.digest_of(path) == first and len(reads) == 1
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    copy = shutil.copy(path, tmp_path / "copy")
    assert input_digests.digest_of(path) == first == input_digests.digest_of(copy)  # only touched, copied
    with path.open("r+b") as file:
        file.seek(input_digests.SMALL_BYTES)
        file.write(b"1")  # of the same size
    assert input_digests.digest_of(path) != first
    assert all(len(kept.read_text()) == 16 for kept in (cache / "digests").iterdir())


def test_a_damaged_memory_of_digests_and_a_cache_that_cannot_be_written_do_not_matter(tmp_path, cache, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(bytes(2 * input_digests.SMALL_BYTES))
    first = input_digests.digest_of(path)
    for kept in (cache / "digests").iterdir():
        kept.write_text(first[:3])
    assert input_digests.digest_of(path) == first
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "file"))
    assert input_digests.digest_of(path) == first


def test_stale_runs_again_what_read_data_that_changed_and_nothing_else(tree, lent, capsys):
    """Run a row that counts the texts of a set, and one that reads none."""
    counts = f"""from pathlib import Path
n = len(list(Path({str(lent)!r}).rglob("*.parquet")))
import os, json
from pruning_lib.experiments.records import checksum
folder = Path(os.environ["PRUNING_RESULTS"]); folder.mkdir()
record = {{"run": os.environ["PRUNING_RUN"], "values": {{"n": n}}}}
(folder / (os.environ["PRUNING_RUN"] + ".json")).write_text(json.dumps({{**record, "checksum": checksum(record)}}))"""
    notebook(tree.notebooks / "tiny.ipynb", "# Tiny", 'name = "none"  # how many', counts)
    (tree.notebooks / "runs.yml").write_text("reads: {notebook: tiny, parameters: {name: c4}}\nplain: {notebook: tiny}")
    write_c4(lent)
    root = ["--root", str(tree.notebooks.parent)]
    assert main.main(["run", "--all", *root]) == 0
    assert main.main(["status", *root]) == 0
    write_c4(lent, "other words")
    capsys.readouterr()
    assert main.main(["status", *root]) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["reads", "inputs changed: c4 in PRUNING_DATA"], ["plain", "up to date"]]
    assert main.main(["run", "--all", "--stale", *root]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "reads: done in " in said[0] and len(said) == 2 and said[1].endswith("plain: up to date")
    assert not [name for name, row in runs.rows(tree).items() if run_command._why(row, tree)]
    assert records.contents(tree.records / "reads.json")["values"] == {"n": 1}
