"""Rows on a real Dask cluster of two worker processes on this machine: sent once, survived, written by the client."""

import os
import signal
import subprocess
import sys

import nbformat
import pytest
import trees
from distributed import LocalCluster
from trees import alive, began, left_over, published, until

from pruning_lib import cli, cluster, rows
from pruning_lib.rows import Row


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the scheduler of two workers, each in a process of its own, one row at a time, one (pretended) GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", trees.HERE["PYTHONPATH"])
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                          resources={"GPU": 1}, local_directory=str(tmp_path_factory.mktemp("dask"))) as local:
            yield local.scheduler_address


def run(tree, address, *names, **options):
    table, said = rows.rows(tree), []
    failed = cluster.run([table[name] for name in names or table], tree, address, say=said.append, **options)
    return failed, "\n".join(said)


def test_rows_run_on_both_workers_and_the_client_writes_what_a_local_run_would_have_written(tmp_path, address):
    wants = {"resources": {"GPU": 1}}
    tree = trees.make(tmp_path, {"a": {"wait_for": "b.began0", **wants}, "b": {"wait_for": "a.began0", **wants}})
    failed, said = run(tree, address)
    assert not failed and said.splitlines()[0] == "3 row(s), 2 at a time on 2 worker(s)"
    assert said.splitlines()[-1].startswith("[3/3] look: done in ")
    assert published(tree) == ["a.ipynb", "a.json", "b.ipynb", "b.json", "look.ipynb"] and not left_over(tree)
    page = nbformat.read(tree.pages / "look.ipynb", as_version=4)
    assert page.cells[-1].outputs[0].data["text/plain"] == "['a', 'b']"  # it had the client's records
    said = []
    assert cluster.run(list(rows.rows(tree).values()), tree, address, say=said.append,
                       up_to_date=lambda row: not cli._why(row, tree)) == []
    assert sum("up to date" in line for line in said) == 3
    assert [len(began(tmp_path, name)) for name in "ab"] == [1, 1]


def test_a_killed_worker_a_row_that_raises_and_one_that_takes_too_much_cost_no_other_row(tmp_path, address):
    tree = trees.make(tmp_path, {"killed": {"act": "kill grandparent"}, "bad": {"act": "raise"},
                                 "big": {"act": "fill memory", "memory_gb": 0.9}, "good": {}})
    failed, said = run(tree, address, "killed", "bad", "big", "good")
    assert sorted(failed) == ["bad", "big"]
    assert "row bad failed in cell" in said and f"the partial page is {tree.failed / 'bad.ipynb'}" in said
    assert "row big was stopped: it took" in said and "its limit is 0.9 GB" in said
    assert published(tree) == ["good.ipynb", "good.json", "killed.ipynb", "killed.json"]
    assert left_over(tree) == ["bad.ipynb"]
    assert len(began(tmp_path, "killed")) == 2 and len(began(tmp_path, "bad")) == 1
    assert not alive(began(tmp_path, "killed")[0]["kernel"]) and not alive(began(tmp_path, "big")[0]["kernel"])


def test_after_the_client_is_killed_only_what_it_did_not_write_is_run_by_the_next(tmp_path, address):
    tree = trees.make(tmp_path, {"a": {}, "b": {"wait_for": "go"}})
    code = "import sys; from pruning_lib import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["run", "a", "b", "--scheduler", address, "--root", str(tmp_path)]
    client = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
                              env=trees.HERE)
    until(lambda: "a: done" in client.stdout.readline())
    until(lambda: began(tmp_path, "b"))
    assert client.poll() is None
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    assert published(tree) == ["a.ipynb", "a.json"]
    before = trees.files(tree.pages)
    (tmp_path / "marks" / "go").touch()
    assert cli.main([*arguments, "--stale"]) == 0
    assert published(tree) == ["a.ipynb", "a.json", "b.ipynb", "b.json"]
    assert len(began(tmp_path, "a")) == 1 and before.items() <= trees.files(tree.pages).items()
    assert not left_over(tree)


def job_for(tree, **changed):
    """What the client would send for a reading that runs at once."""
    return {"row": vars(Row("a", "look", {}, reading=True)), "notebook": (tree.notebooks / "look.ipynb").read_text(),
            "records": {}, "code": {}, "inputs": {}, "folder": "", **changed}


def test_a_worker_with_other_code_refuses_and_says_which(tmp_path):
    answer = cluster.work(job_for(trees.make(tmp_path, {}), code={"results.checksum": "0" * 8}))
    assert answer["kind"] == "failed" and "page" not in answer
    assert "has another pruning_lib (results.checksum); install the same version there" in answer["message"]


def test_a_worker_with_other_data_refuses_and_one_that_has_none_of_its_own_runs(tmp_path, monkeypatch):
    tree = trees.make(tmp_path, {})
    job = job_for(tree, inputs={"c4 in PRUNING_DATA": "0" * 16, "file.json": "0" * 16})
    monkeypatch.setattr(cluster.inputs, "of", lambda row, tree: {"c4 in PRUNING_DATA": "1" * 16})
    answer = cluster.work(job)
    assert answer["kind"] == "failed" and "has another c4 in PRUNING_DATA than the client" in answer["message"]
    monkeypatch.setattr(cluster.inputs, "of", lambda row, tree: {})
    assert cluster.work(job)["kind"] == "done"


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'pruning_lib'"),
                                   RuntimeError("Error during deserialization of the task graph.\nSee docs.")])
def test_a_scheduler_or_worker_without_the_package_is_told_what_it_needs(error):
    """As Dask says it, whose scheduler opens tasks too."""
    assert cluster._in_words(error).startswith("scheduler and workers need pruning_lib too, in the same version as ")


def test_no_scheduler_is_one_line(tmp_path):
    tree = trees.make(tmp_path, {"a": {}})
    with pytest.raises(SystemExit, match="no scheduler at nonsense://x"):
        run(tree, "nonsense://x", "a")
