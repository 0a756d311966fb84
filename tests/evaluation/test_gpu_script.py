"""The script for a GPU: it cuts LLaMA-2-7B's shape as the published code does, and goes on where it stopped."""

import json
import sys
from pathlib import Path

import pytest

from pruning_lib.models import published_configs
from pruning_lib.pruning import importance
from pruning_lib.pruning.selection import choose

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_gpu.py"
sys.path.append(str(SCRIPT.parent))
bench_gpu = __import__("bench_gpu")


@pytest.mark.parametrize(("cut", "heads", "neurons"), [("step 7, as published", 25, 8600),
                                                       ("step 10, as published", 22, 7568),
                                                       ("step 10, multiple of 128", 22, 7552)])
def test_the_cuts_of_the_published_code_have_its_sizes(cut, heads, neurons):
    model = published_configs.random_model(bench_gpu.MODEL)  # no memory
    fraction, multiple = bench_gpu.cuts(model)[cut]
    plan = choose(importance.uniform(model), model, removed_fraction=fraction, heads_removed="same_share",
                  multiple_of=multiple)
    assert plan.kept == {"heads": heads, "groups": heads, "neurons": neurons}


def test_a_second_call_measures_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--toy", "--out", str(path)])
    bench_gpu.main()
    first, rows = capsys.readouterr().out, json.loads(path.read_text())
    assert "2 rows" in first and first.count("writing") == len(rows) == 2
    assert all(0 < row["removed_fraction"] < 1 and row["decode_bound"] > 1 for row in rows.values())
    bench_gpu.main()
    assert "writing" not in capsys.readouterr().out and json.loads(path.read_text()) == rows
