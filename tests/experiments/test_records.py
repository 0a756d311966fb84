"""A record is read as it was written, is written atomically, and contains finite numbers only."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch

import pruning_lib
from pruning_lib.experiments import records as results


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """Return the folder of the records; the first record creates it."""
    monkeypatch.setenv("PRUNING_RESULTS", str(tmp_path / "records"))
    monkeypatch.delenv("PRUNING_RUN", raising=False)
    monkeypatch.delenv("PRUNING_RECORDS", raising=False)
    return tmp_path / "records"


def write(notebook="amp_prune", **changed):
    usual = {"parameters": {"removed_fraction": 0.2}, "values": {"perplexity": 9.5}}
    return results.write(notebook, **{**usual, **changed})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_record_comes_back_as_it_was_written_with_what_it_was_made_with(records):
    rows = [{"method": "amp", "perplexity": 9.5}, {"method": "random", "perplexity": None}]
    path = write(rows=rows, data={"c4": "8fb20ef63ced4145"}, items={"piqa": "8:/w=="})
    assert path == records / "amp_prune.json" and list(records.iterdir()) == [path]
    record = results.read("amp_prune")
    made_with = record.pop("made_with")
    assert record == {"run": "amp_prune", "notebook": "amp_prune", "parameters": {"removed_fraction": 0.2},
                      "values": {"perplexity": 9.5}, "rows": rows, "items": {"piqa": "8:/w=="}}
    assert set(made_with) == {"commit", "torch", "transformers", "lm-eval", "python", "device", "threads", "minutes",
                              "data"}
    assert torch.__version__.startswith(made_with["torch"].split("+")[0])
    assert made_with["threads"] == torch.get_num_threads()
    assert made_with["data"] == {"c4": "8fb20ef63ced4145"} and made_with["minutes"] >= 0 and made_with["commit"]


def test_a_model_from_a_local_folder_is_told_by_the_digest_of_its_weights(records, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_MODELS", str(tmp_path))
    (tmp_path / "org" / "model").mkdir(parents=True)
    found = []
    for weights in (b"as published", b"dequantised"):
        (tmp_path / "org" / "model" / "model.safetensors").write_bytes(weights)
        write(parameters={"model": "org/model", "text": "mini_text", "removed_fraction": 0.2})
        found.append(results.read("amp_prune")["made_with"]["local_weights"])
    assert [set(named) for named in found] == [{"org/model"}] * 2 and found[0] != found[1]
    write()
    assert "local_weights" not in results.read("amp_prune")["made_with"]


def test_the_runner_names_the_run_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_RUN", "amp-20")
    assert write() == tmp_path / "records" / "amp-20.json"
    assert (results.read("amp-20")["run"], results.read("amp-20")["notebook"]) == ("amp-20", "amp_prune")
    for unset in ("PRUNING_RUN", "PRUNING_RESULTS"):
        monkeypatch.setenv(unset, "")
    monkeypatch.chdir(tmp_path)
    assert write().resolve() == tmp_path / "results" / "amp_prune.json"


def test_a_run_reads_finished_records_where_the_runner_says_but_writes_beside_and_its_own_comes_first(
        tmp_path, monkeypatch):
    finished = tmp_path / "finished"
    monkeypatch.setenv("PRUNING_RESULTS", str(finished))
    write("dense", values={"accuracy_fraction": 0.5})
    monkeypatch.setenv("PRUNING_RESULTS", str(tmp_path / "work"))
    monkeypatch.setenv("PRUNING_RECORDS", str(finished))
    before = contents(finished)
    assert results.read("dense")["values"] == {"accuracy_fraction": 0.5}
    with pytest.raises(ValueError, match="no record of run 'pruned'; recorded: dense"):
        results.read("pruned")
    write("dense", values={"accuracy_fraction": 0.75})
    assert results.read("dense")["values"] == {"accuracy_fraction": 0.75} and contents(finished) == before
    assert len(results.to_dataframe("dense")) == 1


def test_numbers_of_numpy_torch_and_pandas_are_stored_as_plain_numbers():
    column = pd.DataFrame({"heads": [3]}).heads
    write(rows=[{"g": torch.tensor(0.25)}],
          values={"a": np.float32(0.5), "b": torch.tensor(2), "c": column.max(), "d": np.bool_(1), "e": None, "f": "x"})
    found = results.read("amp_prune")
    assert found["values"] == {"a": 0.5, "b": 2, "c": 3, "d": True, "e": None, "f": "x"}
    assert found["values"]["d"] is True and found["rows"] == [{"g": 0.25}]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_no_number_is_refused(records, number):
    write()
    before = contents(records)
    with pytest.raises(ValueError):
        write(parameters={"loss": number})
    assert contents(records) == before


@pytest.mark.parametrize(("number", "reason"), [
    (math.nan, "not a number"), (math.inf, "infinite"), (-math.inf, "infinite"), (np.float64("nan"), "not a number"),
    (np.float32("inf"), "infinite"), (torch.tensor(math.nan), "not a number")])
def test_a_result_that_is_no_number_is_null_with_a_reason(records, number, reason):
    """A run of hours is not lost because one of its values is infinite."""
    path = write(values={"loss": number, "n": 1}, rows=[{"loss": number}])
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for values in (found["values"], *found["rows"]):
        assert values["loss"] is None and values["loss_reason"].startswith(reason)
    assert "n_reason" not in found["values"]


def test_a_refused_value_is_named():
    with pytest.raises(ValueError, match="scores is a list"):
        write(values={"scores": [1, 2]})


def test_a_disk_that_fills_up_leaves_the_earlier_record_and_nothing_half_written(records, monkeypatch):
    write()
    before = contents(records)

    def half(path, text, *_):
        path.write_bytes(text[:20].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(results.Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        write(values={"perplexity": 8.0})
    assert contents(records) == before


def test_the_earlier_record_stands_until_the_new_one_is_complete(records, monkeypatch):
    write()
    seen = []
    replace = results.Path.replace
    monkeypatch.setattr(results.Path, "replace", lambda beside, path: (
        seen.append((json.loads(path.read_text())["values"], json.loads(beside.read_text())["values"])),
        replace(beside, path))[1])
    write(values={"perplexity": 8.0})
    assert seen == [({"perplexity": 9.5}, {"perplexity": 8.0})]
    assert [path.name for path in records.iterdir()] == ["amp_prune.json"]


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "two words", "a\n", "-flag"])
def test_a_name_that_could_be_a_path_or_an_option_is_refused(name, records, monkeypatch):
    for act in (lambda: write(name), lambda: results.read(name)):
        with pytest.raises(ValueError, match="use letters, digits, dot, dash and underscore"):
            act()
    if name:
        monkeypatch.setenv("PRUNING_RUN", name)
        with pytest.raises(ValueError, match="run name"):
            write()
    assert not records.exists()


def test_a_record_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match="no record of run 'amp-10'; recorded: none yet.*pruning-lib run amp-10"):
        results.read("amp-10")
    write("zero_shot")
    write("amp_prune")
    with pytest.raises(ValueError, match="recorded: amp_prune, zero_shot"):
        results.read("amp-10")


@pytest.mark.parametrize("damage", [b"", b'{"run": "amp-10", "para', b"[1, 2]", b'{"run": "amp-10"}', b"\x80\x02junk"])
def test_a_damaged_record_is_named_alone_and_in_a_table(records, damage):
    write()
    (records / "amp-10.json").write_bytes(damage)
    for act in (lambda: results.read("amp-10"), lambda: results.to_dataframe("amp_prune")):
        with pytest.raises(ValueError, match="amp-10.json is not a record"):
            act()


def test_a_table_has_a_line_per_record_or_per_row_of_it_and_a_rows_own_win(monkeypatch):
    for run, fraction in (("amp-10", 0.1), ("amp-20", 0.2)):
        monkeypatch.setenv("PRUNING_RUN", run)
        write(parameters={"removed_fraction": fraction, "prompts": 50}, values={"prompts": 49, "bytes": 7},
              rows=[{"method": "dense", "removed_fraction": 0.0}, {"method": "amp", "removed_fraction": fraction / 2}])
    monkeypatch.setenv("PRUNING_RUN", "zero-shot")
    write("zero_shot", values={"accuracy_fraction": 0.5})
    table = results.to_dataframe("amp_prune")
    assert list(table.itertuples(index=False, name=None)) == [
        ("amp-10", 0.0, 49, 7, "dense"), ("amp-10", 0.05, 49, 7, "amp"),
        ("amp-20", 0.0, 49, 7, "dense"), ("amp-20", 0.1, 49, 7, "amp")]
    assert list(table) == ["run", "removed_fraction", "prompts", "bytes", "method"]
    alone = results.to_dataframe("zero_shot")
    assert alone.to_dict("records") == [{"run": "zero-shot", "removed_fraction": 0.2, "accuracy_fraction": 0.5}]
    assert results.to_dataframe("amp_split").empty


@pytest.mark.parametrize("words, parameters", [
    ("dense", {"method": "dense"}),
    ("random", {"method": "random", "criterion": math.nan, "recovery_pairs": math.nan}),
    ("activation norm", {"method": "activation_norm", "criterion": "none"}),
    ("block influence blocks", {"method": "none", "criterion": "block_influence"}),
    ("amp + consensus blocks + LoRA", {"method": "amp", "criterion": "consensus", "recovery_pairs": 9}),
    ("reconstruction error + reconstruction",
     {"method": "reconstruction_error", "reconstruction": "sequential", "recovery_pairs": 0}),
    ("amp + distilled LoRA", {"method": "amp", "recovery_pairs": 9, "kd_weight": 0.5}),
    ("amp + reconstruction in one pass", {"method": "amp", "reconstruction": "one_pass"})])
def test_a_recipe_is_named_by_what_was_done(words, parameters):
    assert results.recipe(parameters) == words


def test_recipes_are_named_by_what_departs_from_most_and_are_there_once(monkeypatch):
    asked = {"model": "toy", "method": "amp", "removed_fraction": 0.3, "heads_removed": 3}
    usual = {**asked, "kd_weight": 0.0, "prompts": 50, "seed": 0, "dtype": "bfloat16", "recovery_pairs": 0,
             "reconstruction": "none", "reconstruction_samples": 200, "reconstruction_text": "c4"}
    runs = {"amp": {}, "a-float32": {"dtype": "float32"}, "wanda": {"method": "wanda"}, "six": {"heads_removed": 6},
            "dense": {"method": "dense", "heads_removed": 0}, "solved": {"reconstruction": "sequential"},
            "solved-12": {"reconstruction": "sequential", "reconstruction_samples": 12},
            "share": {"heads_removed": "same_share"},
            "distilled": {"recovery_pairs": 9, "kd_weight": 0.5}, "few": {"prompts": 9}, "big": {"model": "large"},
            "tuned": {"heads_removed": 0, "recovery_pairs": 9, "dtype": "float32"}}
    assert results.recipes().empty
    for run, changed in runs.items():
        monkeypatch.setenv("PRUNING_RUN", run)
        write("recipe", parameters={**usual, **changed}, values={"perplexity": 7.0})
    monkeypatch.setenv("PRUNING_RUN", "asked")
    write("zero_shot", parameters=asked, values={})
    table = results.recipes().set_index("run")
    assert dict(table.label) == {
        "amp": "amp", "asked": "amp", "wanda": "wanda", "dense": "dense", "tuned": "amp + LoRA, neurons only",
        "solved": "amp + reconstruction", "solved-12": "amp + reconstruction", "six": "amp, 6 heads a block",
        "share": "amp, same share of heads", "distilled": "amp + distilled LoRA", "few": "amp", "big": "amp (large)"}
    assert table.recipe["tuned"] == "amp, neurons only" and table.split["tuned"] == ", neurons only"
    assert table.text_used["solved-12"] == "12 texts of c4" and table.text_used["amp"] == ""
    assert set(results.recipes(every_format=True).run) == set(table.index) | {"a-float32"}


def test_an_interval_in_words_follows_its_form():
    assert results.format_interval(1234.56, 1200.0, 1300.04, ",.1f") == "1,234.6 [1,200.0, 1,300.0]"
    assert results.format_interval(0.01, -0.002, 0.022, "+.3f") == "+0.010 [-0.002, +0.022]"


def test_a_notebook_in_its_own_folder_reads_published_records_until_there_are_some_of_its_own(tmp_path, monkeypatch):
    for name in ("PRUNING_RESULTS", "PRUNING_RECORDS", "PRUNING_RUN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "runs.yml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    published = results.write("some", values={"a_number": 1}, parameters={})
    published.parent.rename(tmp_path / "results")
    (tmp_path / "data").mkdir()
    (tmp_path / "results").rename(tmp_path / "data" / "results")
    assert results.read("some")["values"] == {"a_number": 1}
    assert list(results.to_dataframe("some").a_number) == [1]
    results.write("some", values={"a_number": 2}, parameters={})
    assert list(results.to_dataframe("some").a_number) == [2]
    assert results.read("some")["values"]["a_number"] == 2


def test_minutes_of_a_run_count_from_the_first_import_of_the_package(monkeypatch):
    monkeypatch.setattr(pruning_lib, "_started", time.monotonic() - 600)
    assert results.made_with({})["minutes"] == pytest.approx(10, abs=0.1)


def test_infinities_in_a_list_are_null_with_a_reason():
    assert results.finite({"losses": [1.0, math.inf, [math.nan]], "names": ["a"]}) == {
        "losses": [1.0, None, [None]], "names": ["a"],
        "losses_reason": "item 1: infinite: too large for a floating-point number; item 2: item 0: not a number"}
