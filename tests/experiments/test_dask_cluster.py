"""Execution on a real Dask cluster of two local workers: rows run once, survive, and are written by the client."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import dask
import nbformat
import pytest
import torch
import trees
from conftest import build
from distributed import Client, LocalCluster
from test_amp import padded
from trees import alive, began, left_over, published
from two_processes import until

from pruning_lib.cli import main
from pruning_lib.cli import run as run_command
from pruning_lib.experiments import dask_cluster, runs, staleness
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.models import families
from pruning_lib.pruning import amp


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Yield the address of a scheduler with two worker processes, one row each, one simulated GPU.

    A row may kill one worker and fails at the second; the default of Dask is three.
    """
    with pytest.MonkeyPatch.context() as patch, dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        patch.setenv("PYTHONPATH", trees.HERE["PYTHONPATH"])
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                          resources={"GPU": 1}, local_directory=str(tmp_path_factory.mktemp("dask"))) as local:
            yield local.scheduler_address


def run(tree, address, *names, **options):
    table, said = runs.rows(tree), []
    failed = dask_cluster.run([table[name] for name in names or table], tree, address, log=said.append, **options)
    return failed, "\n".join(said)


def test_rows_run_on_both_workers_and_the_client_writes_what_a_local_run_would_have_written(tmp_path, address):
    wants = {"resources": {"GPU": 1}}
    tree = trees.make(tmp_path, {"a": {"wait_for": "b.began0", **wants}, "b": {"wait_for": "a.began0", **wants}})
    failed, said = run(tree, address, retries=3)  # kernels that start at once can take the same port and fail
    assert not failed, said
    assert said.splitlines()[0] == "3 row(s), 2 at a time on 2 worker(s)"
    assert said.splitlines()[-1].startswith("[3/3] look: done in ")
    assert published(tree) == ["a.ipynb", "a.json", "b.ipynb", "b.json", "look.ipynb"] and not left_over(tree)
    page = nbformat.read(tree.pages / "look.ipynb", as_version=4)
    assert page.cells[-1].outputs[0].data["text/plain"] == "['a', 'b']"  # it had the client's records
    said = []
    assert dask_cluster.run(list(runs.rows(tree).values()), tree, address, log=said.append,
                       up_to_date=lambda row: not run_command._why(row, tree)) == []
    assert sum("up to date" in line for line in said) == 3
    assert [len(began(tmp_path, name)) for name in "ab"] == [1, 1]
    stale = [row.name for row in runs.rows(tree).values() if staleness.staleness_of(row, tree).why]
    assert not stale  # page and record are a pair


def test_a_row_waits_for_a_worker_with_what_it_wants_and_says_so(tmp_path, address):
    tree = trees.make(tmp_path, {"a": {"resources": {"TPU": 2}}})
    comes = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny",
             "--no-dashboard", "--resources", "TPU=2", "--local-directory", str(tmp_path / "dask")]
    said, late = [], []

    def log(text):
        said.append(text)
        if "waits for" in text:
            assert not began(tmp_path, "a")
            late.append(subprocess.Popen(comes, env=trees.HERE, stderr=subprocess.DEVNULL))

    try:
        assert not dask_cluster.run([runs.rows(tree)["a"]], tree, address, log=log)
        assert "a: waits for a worker with TPU=2; none has that much now" in said[1] and len(late) == 1
        ran_under = began(tmp_path, "a")[0]["runner"]
    finally:
        for process in late:
            process.kill()
            process.wait()
    assert not alive(ran_under)


def test_the_importance_of_prompts_is_shared_by_workers_and_merged_bit_for_bit(address, prompts):
    model = build(families.tiny("llama", width=48, vocabulary=128))
    batches = [padded([prompt]) for prompt in prompts]
    whole = amp.importance(model, batches, progress=False)
    with Client(address, set_as_default=False) as client:
        workers = list(client.nthreads())
        parts = [client.submit(amp.score_sums, model, batches[i::2], progress=False, workers=[workers[i]], pure=False)
                 for i in range(2)]
        merged = amp.merge(client.gather(parts))
        assert len({who for part in parts for who in client.who_has(part)[part.key]}) == 2
    assert torch.equal(merged.heads, whole.heads) and torch.equal(merged.neurons, whole.neurons)


def test_a_killed_worker_a_row_that_raises_and_one_that_takes_too_much_cost_no_other_row(tmp_path, address):
    tree = trees.make(tmp_path, {"killed": {"act": "kill grandparent"}, "bad": {"act": "raise"},
                                 "big": {"act": "fill memory", "memory_gb": 0.9}, "good": {},
                                 "rubbish": {"act": "write rubbish"}, "kernel": {"act": "kill kernel"}})
    failed, said = run(tree, address, "killed", "bad", "big", "good", "rubbish", "kernel")
    assert sorted(failed) == ["bad", "big"]
    assert "kernel: once more" in said and len(began(tmp_path, "kernel")) == 2
    assert "row bad failed in cell" in said and f"the partial page is {tree.failed / 'bad.ipynb'}" in said
    assert "row big was stopped: it took" in said and "its limit is 0.9 GB" in said
    assert published(tree) == [f"{name}.{kind}" for name in ("good", "kernel", "killed", "rubbish")
                               for kind in ("ipynb", "json")]
    assert staleness.staleness_of(runs.rows(tree)["rubbish"], tree).why == "the record cannot be read"
    assert left_over(tree) == ["bad.ipynb"]
    assert len(began(tmp_path, "killed")) == 2 and len(began(tmp_path, "bad")) == 1
    assert not alive(began(tmp_path, "killed")[0]["kernel"]) and not alive(began(tmp_path, "big")[0]["kernel"])


def test_a_row_that_kills_every_worker_it_is_given_to_is_reported(tmp_path, address):
    tree = trees.make(tmp_path, {"a": {"act": "kill every grandparent"}})
    failed, said = run(tree, address, "a")
    assert failed == ["a"] and "row a failed: KilledWorker: Attempted to run task" in said
    assert len(began(tmp_path, "a")) == 2 and not published(tree) and not left_over(tree)


def test_on_a_full_disk_rows_are_reported_and_run_when_there_is_room_again(tmp_path, address, small_disk):
    trees.make(tmp_path / "root", {"a": {}, "b": {"act": "fill disk"}})
    tree, filler = Tree.at(tmp_path / "root", small_disk / "own"), small_disk / "filler"
    failed, said = run(tree, address, "b")
    assert failed == ["b"] and "row b failed: [Errno 28] No space left on device" in said and not published(tree)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    failed, said = run(tree, address, "a")  # no space even for its lock
    assert failed == ["a"] and "row a failed: [Errno 28] No space left on device" in said and not left_over(tree)
    filler.unlink()
    assert not run(tree, address, "a")[0] and published(tree) == ["a.ipynb", "a.json"] and not left_over(tree)


def test_after_the_client_is_killed_only_what_it_did_not_write_is_run_by_the_next(tmp_path, address):
    tree = trees.make(tmp_path, {"a": {}, "b": {"wait_for": "go"}})
    code = "import sys; from pruning_lib.cli import main; sys.exit(main.main(sys.argv[1:]))"
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
    assert main.main([*arguments, "--stale"]) == 0
    assert published(tree) == ["a.ipynb", "a.json", "b.ipynb", "b.json"]
    assert len(began(tmp_path, "a")) == 1 and before.items() <= trees.files(tree.pages).items()
    assert not left_over(tree)


def job_for(tree, **changed):
    """Return the job that the client sends for a reading."""
    return {"row": vars(Row("a", "look", {}, reading=True)), "notebook": (tree.notebooks / "look.ipynb").read_text(),
            "records": {}, "code": {}, "inputs": {}, "folder": "", **changed}


def test_a_worker_with_other_code_refuses_and_says_which(tmp_path):
    answer = dask_cluster.work(job_for(trees.make(tmp_path, {}), code={"results.checksum": "0" * 8}))
    assert answer["kind"] == "failed" and "page" not in answer
    assert "has another pruning_lib (results.checksum); install the same version there" in answer["message"]


def test_a_worker_with_other_data_refuses_and_one_that_has_none_of_its_own_runs(tmp_path, monkeypatch):
    tree = trees.make(tmp_path, {})
    job = job_for(tree, inputs={"c4 in PRUNING_DATA": "0" * 16, "file.json": "0" * 16})
    monkeypatch.setattr(dask_cluster.input_digests, "digests_of", lambda row, tree: {"c4 in PRUNING_DATA": "1" * 16})
    answer = dask_cluster.work(job)
    assert answer["kind"] == "failed" and "has another c4 in PRUNING_DATA than the client" in answer["message"]
    monkeypatch.setattr(dask_cluster.input_digests, "digests_of", lambda row, tree: {})
    assert dask_cluster.work(job)["kind"] == "done"


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'pruning_lib'"),
                                   RuntimeError("Error during deserialization of the task graph.\nSee docs.")])
def test_a_scheduler_or_worker_without_the_package_is_told_what_it_needs(error):
    """Cover the errors of Dask, whose scheduler deserialises tasks too."""
    needed = "scheduler and workers need pruning_lib too, in the same version as "
    assert dask_cluster._in_words(error).startswith(needed)


def test_no_scheduler_is_one_line(tmp_path):
    tree = trees.make(tmp_path, {"a": {}})
    with pytest.raises(SystemExit, match="no scheduler at nonsense://x"):
        run(tree, "nonsense://x", "a")
