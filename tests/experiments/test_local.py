"""Parallel rows for real: shared resources, order, and recovery after the death of a process."""

import os
import signal
import subprocess
import sys
import threading

import nbformat
import pytest
import trees
from trees import alive, began, ended, left_over, published
from two_processes import until

from pruning_lib import _locks
from pruning_lib.cli import main
from pruning_lib.experiments import local, runs, staleness
from pruning_lib.experiments.local import Machine
from pruning_lib.experiments.runs import Row, Tree

PAIR = Machine(jobs=2, threads=1, memory_gb=100)


def run(tree, *names, machine=PAIR, **options):
    """Return (names of failed rows, log)."""
    table, said = runs.rows(tree), []
    failed = local.run([table[name] for name in names or table], tree, machine, log=said.append, **options)
    return failed, "\n".join(said)


def test_rows_run_side_by_side_with_their_share_of_cores_and_a_reading_after_the_runs_it_reads(tmp_path):
    tree = trees.make(tmp_path, {"a": {"wait_for": "b.began0"}, "b": {"wait_for": "a.began0"}})
    failed, said = run(tree, machine=Machine(jobs=3, threads=3, memory_gb=100))  # all three fit
    assert not failed and [line.split()[0] for line in said.splitlines()] == ["[1/3]", "[2/3]", "[3/3]"]
    assert "min left" in said.splitlines()[1] and "min left" not in said.splitlines()[2]
    assert began(tmp_path, "a")[0]["threads"] == "3"
    page = nbformat.read(tree.pages / "look.ipynb", as_version=4)
    assert page.cells[-1].outputs[0].data["text/plain"] == "['a', 'b']"
    assert published(tree) == ["a.ipynb", "a.json", "b.ipynb", "b.json", "look.ipynb"] and not left_over(tree)


def test_rows_that_do_not_fit_together_run_one_after_the_other_and_one_that_never_fits_is_reported(tmp_path):
    tree = trees.make(tmp_path, {"a": {"memory_gb": 3}, "b": {"memory_gb": 3}, "c": {"memory_gb": 7},
                                 "d": {"resources": {"GPU": 1}}})
    failed, said = run(tree, "a", "b", "c", "d", machine=Machine(jobs=4, threads=1, memory_gb=5))
    assert sorted(failed) == ["c", "d"]
    assert "row c needs 7 GB, there are 5.0 GB; see --memory" in said
    assert "row d needs 1 GPU, this machine has 0; run it with --scheduler" in said
    assert began(tmp_path, "b")[0]["time"] > ended(tmp_path, "a") and not began(tmp_path, "c")


def test_each_row_gets_devices_of_its_own(tmp_path):
    wants = {"resources": {"GPU": 1}}
    tree = trees.make(tmp_path, {"a": {"wait_for": "b.began0", **wants}, "b": {"wait_for": "a.began0", **wants}})
    assert not run(tree, "a", "b", machine=Machine(2, 1, 100, {"GPU": [4, 7]}))[0]
    assert {began(tmp_path, name)[0]["gpus"] for name in "ab"} == {"4", "7"}


@pytest.mark.parametrize("kills", ["kill runner", "kill kernel"])
def test_a_row_whose_process_is_killed_is_run_once_more(tmp_path, kills):
    tree = trees.make(tmp_path, {"a": {"act": kills}})
    failed, said = run(tree, "a")
    assert not failed and "a: once more" in said and "[1/1] a: done" in said
    assert len(began(tmp_path, "a")) == 2
    assert published(tree) == ["a.ipynb", "a.json"] and not left_over(tree)


def test_without_retries_a_killed_row_is_reported_and_leaves_nothing(tmp_path):
    tree = trees.make(tmp_path, {"a": {"act": "kill runner"}})
    failed, said = run(tree, "a", retries=0)
    assert failed == ["a"] and "row a: its process was killed by signal 9" in said
    assert not published(tree) and not left_over(tree)
    until(lambda: not alive(began(tmp_path, "a")[0]["kernel"]), 10)  # the kernel ended too


def test_rows_that_raise_or_take_too_much_are_reported_as_such_once_and_the_others_stay(tmp_path):
    tree = trees.make(tmp_path, {"bad": {"act": "raise"}, "big": {"act": "fill memory", "memory_gb": 0.9}, "good": {}})
    failed, said = run(tree, "bad", "big", "good")
    assert sorted(failed) == ["bad", "big"]
    assert "row bad failed in cell" in said and "ValueError: boom" in said
    assert "row big was stopped: it took" in said and "its limit is 0.9 GB (memory_gb in runs.yml)" in said
    assert [len(began(tmp_path, name)) for name in ("bad", "big", "good")] == [1, 1, 1]  # again it would fail again
    assert published(tree) == ["good.ipynb", "good.json"] and left_over(tree) == ["bad.ipynb"]
    assert not alive(began(tmp_path, "big")[0]["kernel"])


def test_two_runners_share_the_rows_of_a_tree_and_none_is_run_twice(tmp_path):
    tree = trees.make(tmp_path, {"a": {"wait_for": "b.began0"}, "b": {}})
    outcomes = []
    alone = Machine(jobs=1, threads=1, memory_gb=100)
    runners = [threading.Thread(target=lambda: outcomes.append(run(tree, "a", "b", machine=alone))) for _ in range(2)]
    runners[0].start()
    until(lambda: began(tmp_path, "a"))  # one process is running a and continues only when the other runs b
    runners[1].start()
    for thread in runners:
        thread.join(60)
    assert [failed for failed, _ in outcomes] == [[], []]
    said = "\n".join(text for _, text in outcomes)
    assert "a: left to process " in said and "a: done by another runner" in said
    assert [len(began(tmp_path, name)) for name in "ab"] == [1, 1]
    assert published(tree) == ["a.ipynb", "a.json", "b.ipynb", "b.json"] and not left_over(tree)


def test_a_row_asked_for_alone_waits_for_whoever_runs_it(tmp_path, capsys):
    tree = trees.make(tmp_path, {"a": {}})
    with _locks.lock(tree.lock(Row("a", "step", {}))):
        thread = threading.Thread(target=main.main, args=(["run", "a", "--root", str(tmp_path)],))
        thread.start()
        said = []
        until(lambda: said.append(capsys.readouterr().out) or "waiting for process" in "".join(said))
        assert f"a: waiting for process {os.getpid()} on " in "".join(said) and not began(tmp_path, "a")
    thread.join(60)
    assert len(began(tmp_path, "a")) == 1


@pytest.fixture
def client(tmp_path):
    """Return the tree after ``pruning-lib run --all -j 2`` was killed with ``a`` finished and ``b`` running."""
    tree = trees.make(tmp_path, {"a": {}, "b": {"wait_for": "go"}})
    command = [sys.executable, "-m", "pruning_lib.cli", "run", "--all", "-j", "2", "--root", str(tmp_path)]
    code = "import sys; from pruning_lib.cli import main; sys.exit(main.main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *command[3:]], stdout=subprocess.PIPE, text=True,
                               env=trees.HERE)
    assert "a: done" in process.stdout.readline()
    until(lambda: began(tmp_path, "b"))
    assert process.poll() is None  # messages appeared during the run
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return tree


def test_after_the_client_is_killed_nothing_half_done_is_seen_and_only_the_rest_is_run_again(client, tmp_path, capsys):
    was = began(tmp_path, "b")[0]
    until(lambda: not alive(was["runner"]) and not alive(was["kernel"]), 10)  # no process continues
    assert published(client) == ["a.ipynb", "a.json"]
    before = trees.files(client.pages)
    (tmp_path / "marks" / "go").touch()
    assert main.main(["run", "--all", "--stale", "-j", "2", "--root", str(tmp_path)]) == 0
    assert "a: up to date" in capsys.readouterr().out
    assert [len(began(tmp_path, name)) for name in "ab"] == [1, 2] and not left_over(client)
    assert before.items() <= trees.files(client.pages).items()


def test_on_a_full_disk_a_row_is_reported_and_what_was_published_stays(tmp_path, small_disk):
    root = tmp_path / "root"
    trees.make(root, {"a": {}, "b": {"act": "fill disk"}})
    tree = Tree.at(root, small_disk / "own")
    assert not run(tree, "a")[0]
    before = trees.files(small_disk)
    failed, said = run(tree, "b", "a", machine=Machine(1, 1, 100),
                       up_to_date=lambda row: not staleness.staleness_of(row, tree).why)
    assert failed == ["b"] and "No space left on device" in said and "[2/2] a: up to date" in said
    assert trees.files(small_disk) == before


def test_a_machine_offers_what_it_has_and_never_more_threads_than_cores(monkeypatch):
    for name in local.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    cores = len(os.sched_getaffinity(0))
    here = Machine.here()
    assert (here.jobs, here.threads, here.devices) == (cores, 1, {"GPU": [2, 5]}) and 0 < here.memory_gb < 1e5
    for jobs in (1, cores, 3 * cores):
        assert jobs == 1 or Machine.here(jobs).threads * jobs <= max(jobs, cores)
    assert Machine.here(1).threads == cores and Machine.here(1, 7.5).memory_gb == 7.5
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Machine.here(1).threads == 1  # a smaller request is respected


def test_the_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    assert 0 < local._free_gb(tmp_path) < 1e5  # no container
    (tmp_path / "memory.current").write_text("30000000\n")
    for limit, free in (("50000000\n", 0.02), ("1" + "0" * 30, local.psutil.virtual_memory().available / 1e9),
                        ("max\n", local.psutil.virtual_memory().available / 1e9)):
        (tmp_path / "memory.max").write_text(limit)
        assert local._free_gb(tmp_path) == pytest.approx(free, rel=0.2)


def test_a_row_of_another_runner_is_tried_again_after_a_while_and_said_once_and_readings_wait_for_it(
        tmp_path, monkeypatch):
    tree, said = trees.make(tmp_path, {"a": {}}), []
    table = runs.rows(tree)
    waiting = local.Queue(list(table.values()), tree, 1, 1, said.append)
    assert waiting.ready([]) == [table["a"]]
    monkeypatch.setattr(local, "HELD_S", 0.3)
    for _ in range(2):
        waiting.defer(table["a"], "process 7")
    assert waiting.ready([]) == [] and said == ["a: left to process 7, which runs it"]
    until(lambda: waiting.ready([]) == [table["a"]], 5)
    waiting.rows.remove(table["a"])
    assert waiting.ready([table["a"]]) == [] and waiting.ready([]) == [table["look"]]
    lost = local.Outcome("lost", "it died")
    assert [waiting.should_retry(table["a"], outcome) for outcome in (local.Outcome("failed"), lost, lost)] == [
        False, True, False]


def test_what_nobody_had_to_run_says_nothing_about_how_long_a_row_takes(tmp_path):
    tree, said = trees.make(tmp_path, {"a": {}, "b": {}, "c": {}}), []
    progress = local.Progress([runs.rows(tree)[name] for name in "abc"], tree, 1, said.append)
    progress.finished(runs.rows(tree)["a"], local.Outcome("done"), 10)
    progress.finished(runs.rows(tree)["b"], local.Outcome("done", "up to date"), 0)
    assert said[1] == "[2/3] b: up to date; about 10 min left"


def test_the_time_left_is_that_of_the_earlier_records(tmp_path):
    tree = trees.make(tmp_path, {"a": {}, "b": {}, "c": {}})
    tree.records.mkdir(parents=True)
    (tree.records / "b.json").write_text('{"made_with": {"minutes": 30.0}}')
    said = []
    progress = local.Progress([runs.rows(tree)[name] for name in "abc"], tree, 2, said.append)
    progress.finished(runs.rows(tree)["a"], local.Outcome("done"), 10)
    page = tree.page(runs.rows(tree)["a"])
    assert said == [f"[1/3] a: done in 10.0 min, {page}; about 20 min left"]  # (30 + 10, the mean of finished rows) / 2
