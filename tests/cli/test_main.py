"""The command runs the requested rows, writes to the documented places, and refuses bad input before any run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from test_execution import ROWS, make_tree, notebook

from pruning_lib import __version__
from pruning_lib.cli import main
from pruning_lib.experiments import execution, runs, staleness
from pruning_lib.experiments.execution import RowFailed
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.models import loading
from pruning_lib.report import book


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a repository with notebooks and rows but without pages, as the current folder."""
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch):
    """Return (row, tree) of every intercepted run; rows named ``mute`` fail."""
    calls = []

    def run(row, tree, **_):
        calls.append((row, tree))
        if row.name == "mute":
            raise RowFailed("row mute failed in cell 2: ValueError: boom")

    monkeypatch.setattr(execution, "run", run)
    return calls


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def command(*arguments, cwd):
    """Run the installed command as a user does."""
    program = Path(sys.executable).with_name("pruning-lib")
    return subprocess.run([str(program), *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_lists_every_command_and_option_with_a_word_on_each(capsys):
    for arguments, wanted in ((["-h"], ("run", "status", "book", "--version")),
                              (["run", "-h"], ("ROW", "--all", "--defaults", "--stale", "-p NAME=VALUE", "--out"))):
        with pytest.raises(SystemExit) as end:
            main.main(arguments)
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert not [word for word in wanted if word not in shown]


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_no_command_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit) as end:
        main.main([])
    assert end.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["run", "smal"], "no row smal; nearest to smal: small, silent, (plain|mute|tiny); all rows: pruning-lib"),
    (["run", "small", "-p", "fractoin=0.1"], "tiny has no parameter 'fractoin'; it has: fraction, count, name, flag"),
    (["run", "small", "-p", "count=many"], "parameter count takes int like 3, got 'many'"),
    (["run", "small", "-p", "count=true"], "parameter count takes int like 3, got True"),
    (["run", "plain", "look", "-p", "count=1"], "row look: look has no parameter 'count'"),
    (["run", "small", "-p", "count"], "-p count: give NAME=VALUE"),
    (["run"], "give either names of rows, or --all, or --defaults"),
    (["run", "small", "--all"], "give either names of rows, or --all, or --defaults"),
    (["run", "--all", "--defaults"], "give either names of rows, or --all, or --defaults"),
    (["status", "--root", "notebooks"], "no notebooks/runs.yml; call from the repository, or give --root"),
    (["book", "--out", "nowhere"], "no pages in nowhere")])
def test_what_makes_no_sense_is_refused_before_anything_runs_or_is_written(root, ran, arguments, message):
    before = files(root)
    with pytest.raises(SystemExit, match=message):  # Python prints the text on stderr and exits with 1
        main.main(arguments)
    assert not ran and files(root) == before


def test_a_refusal_is_one_line_on_stderr_and_the_status_is_1(root):
    before = files(root)
    done = command("run", "small", "-p", "count=many", cwd=root)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "row small: parameter count takes int like 3, got 'many'\n"
    assert files(root) == before


def test_rows_run_in_the_order_given_into_the_published_tree(root, ran):
    assert main.main(["run", "plain", "small"]) == 0
    assert [row.name for row, _ in ran] == ["plain", "small"]
    assert {tree for _, tree in ran} == {Tree.at(root)}
    assert ran[1][0].parameters == {"fraction": 1, "count": 7}


def test_other_values_go_to_a_place_of_their_own_and_never_to_the_published_pages(root, ran):
    assert main.main(["run", "small", "-p", "fraction=0.1", "-p", "name=a=b", "-p", "flag=true"]) == 0
    (row, tree), = ran
    assert row == Row("small", "tiny", {"fraction": 0.1, "count": 7, "name": "a=b", "flag": True})
    assert tree == Tree.at(root, root / "build" / "own")
    assert not {tree.pages, tree.records} & {Tree.at(root).pages, Tree.at(root).records}
    assert main.main(["run", "small", "-p", "name=", "--out", "mine"]) == 0
    row, tree = ran[1]
    assert row.parameters["name"] == "" and tree.pages == Path("mine/executed")


@pytest.mark.parametrize(("given", "value"), [
    ("name=runs/model #3", "runs/model #3"), ("name=[a", "[a"), ("name=007", "007"), ("name=true", "true"),
    ("name=a: b=c", "a: b=c"), ("name='quoted # text'", "quoted # text"), ("name= x", " x"), ("name=null", "null"),
    ("count=11", 11), ("fraction=1e-3", 0.001), ("fraction=2", 2.0), ("flag=true", True)])
def test_values_arrive_as_typed(root, ran, given, value):
    assert main.main(["run", "small", "-p", given]) == 0
    (row, _), = ran
    found = row.parameters[given.partition("=")[0]]
    assert (found, type(found)) == (value, type(value))


def test_a_notebook_can_be_named_instead_of_a_row(root, ran):
    assert main.main(["run", "tiny"]) == 0
    assert ran[0][0] == Row("tiny", "tiny", {})


def test_all_and_defaults_take_every_row_and_every_notebook(root, ran):
    main.main(["run", "--all"])
    main.main(["run", "--defaults", "--out", "elsewhere"])
    assert [row.name for row, _ in ran] == [*ROWS, "tiny", "silent", "look"]
    assert [tree.pages for _, tree in ran][-1] == Path("elsewhere/executed")


def test_one_row_that_fails_does_not_keep_the_others_from_running(root, ran, capsys):
    assert main.main(["run", "mute", "small"]) == 1
    assert [row.name for row, _ in ran] == ["mute", "small"]
    out, said = capsys.readouterr()
    assert "row mute failed in cell 2: ValueError: boom" in said and "1 row(s) failed" in said and "mute" not in out


def test_quiet_and_json_print_failures_on_stderr_and_the_result_alone_on_stdout(root, ran, capsys):
    assert main.main(["run", "mute", "small", "-q"]) == 1
    out, said = capsys.readouterr()
    assert out == "" and "boom" in said
    assert main.main(["run", "mute", "small", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"pages": {"small": str(Tree.at(root).page(Row("small", "tiny", {})))}, "failed": ["mute"]}
    assert main.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dict.fromkeys(["small", "plain", "mute", "look"], "no page yet")


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["run", "--help"], ["--version"]])
def test_help_loads_no_heavy_package(arguments):
    """Counted, not timed: NumPy alone takes longer than all of this."""
    heavy = ("torch", "transformers", "numpy", "scipy", "yaml", "nbformat", "papermill", "pandas", "lm_eval",
             "datasets")
    code = (f"import sys\nfrom pruning_lib.cli import main\ntry:\n    main.main({arguments})\nexcept SystemExit:\n"
            f"    pass\nprint([m for m in {heavy} if m in sys.modules], len(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, _, count = done.stderr.strip().rpartition(" ")
    assert loaded == "[]" and int(count) < 250


def test_an_interruption_ends_without_a_traceback(root, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "run", interrupt)
    assert main.main(["run", "small"]) == 130
    assert capsys.readouterr().err == "pruning-lib: interrupted\n"


def test_a_mistyped_command_answers_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["prun"])
    assert end.value.code == 2 and "unknown 'prun'; nearest: prune, run" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "wanted"), [
    (["pruning-lib", "pr"], ["prune"]), (["pruning-lib", "prune", "--method", "ac"], ["activation_norm"]),
    (["pruning-lib", "prune", "--calib"], ["--calibration"]),
    (["pruning-lib", "evaluate", "--tasks", "o"], ["official"]),
    (["pruning-lib", "prune", "--grouped-query", "w"], ["whole_groups"]), (["pruning-lib", "list", "mo"], ["models"]),
    (["pruning-lib", "evaluate", "cifar10-resnet2"], ["cifar10-resnet20"])])
def test_the_completion_script_completes(capsys, words, wanted):
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    assert main.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    given = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(["bash", "-c", f"{script}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) - 1}\n_pruning_lib\n"
                           'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True)
    assert done.stdout.split() == wanted and not done.stderr


def test_every_name_in_a_table_is_listed_with_a_word(capsys):
    from pruning_lib import data
    from pruning_lib.pruning.importance import METHODS

    assert main.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["methods"]) == {*METHODS, "none"} and set(found["texts"]) == set(data.DATASETS)
    assert "loss" not in found["criteria"] and all(found["criteria"].values())


@pytest.fixture
def small_is_fresh(root):
    """Write an up-to-date page of ``small``, and a page of ``plain`` from another notebook."""
    tree, rows = Tree.at(root), runs.rows(Tree.at(root))
    tree.records.mkdir(parents=True)
    for name, made_from in (("small", staleness.fingerprint(rows["small"], tree)), ("plain", "0" * 16)):
        page = tree.pages / f"{name}.ipynb"
        notebook(page, "# Page")
        read = nbformat.read(page, as_version=4)
        read.metadata["pruning_lib"] = {"fingerprint": made_from}
        nbformat.write(read, page)
        (tree.records / f"{name}.json").write_text("{}")


def test_stale_leaves_out_rows_that_are_up_to_date(small_is_fresh, ran, capsys):
    assert main.main(["run", "--all", "--stale"]) == 1  # mute fails
    assert [row.name for row, _ in ran] == ["plain", "mute", "look"]
    assert "small: up to date" in capsys.readouterr().out
    assert main.main(["run", "small"]) == 0
    assert [row.name for row, _ in ran][-1] == "small"  # a row given by name runs


def test_status_says_for_each_row_whether_and_why_it_has_to_run_and_changes_nothing(small_is_fresh, root, capsys):
    before = files(root)
    assert main.main(["status"]) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["small", "up to date"], ["plain", "notebook or parameters changed"], ["mute", "no page yet"],
        ["look", "no page yet"]]
    assert files(root) == before


def test_who_reads_along_may_stop_reading(root):
    """Close the pipe as ``pruning-lib status | head -1`` does: no traceback, and no error on exit."""
    program = [str(Path(sys.executable).with_name("pruning-lib")), "status"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(program, cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_command_runs_a_row_for_real_with_another_value_and_touches_no_published_page(root, small_is_fresh):
    """Run a notebook without torch, to save seconds."""
    light = "import os, pathlib\npathlib.Path(os.environ['PRUNING_RESULTS']).mkdir()\n" \
            "(pathlib.Path(os.environ['PRUNING_RESULTS']) / 'small.json').write_text(str(count))"
    notebook(root / "notebooks" / "tiny.ipynb", "# Tiny", "fraction = 0.5\ncount = 3  # how many", light)
    before = {name: (root / name).read_bytes() for name in files(root)}
    done = command("run", "small", "-p", "count=11", cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[1/1] small: done in ") and done.stdout.rstrip().endswith("small.ipynb")
    own = {"build/own/executed/small.ipynb", "build/own/results/small.json"}
    assert set(files(root)) == {*before, *own}
    assert {name: (root / name).read_bytes() for name in before} == before
    assert (root / "build/own/results/small.json").read_text() == "11"


def test_one_notebook_has_several_pages_under_names_of_the_user(root, small_is_fresh, monkeypatch):
    made = []
    monkeypatch.setattr(execution, "run", lambda row, tree, *, log: made.append((row, tree.page(row))))
    for number in ("7", "8"):
        assert main.main(["run", "small", "--name", f"mine-{number}", "-p", f"count={number}"]) == 0
    assert [(row.name, row.notebook, row.parameters["count"]) for row, _ in made] == [
        ("mine-7", "tiny", 7), ("mine-8", "tiny", 8)]
    assert [page.relative_to(root) for _, page in made] == [Path(f"build/own/executed/mine-{n}.ipynb") for n in (7, 8)]
    for wrong in (["small", "plain", "--name", "mine"], ["look", "--name", "mine"], ["small", "--name", "../mine"]):
        with pytest.raises(SystemExit, match="--name"):
            main.main(["run", *wrong])


def test_book_shows_every_page_that_was_run_under_a_name_of_the_user(root, small_is_fresh, monkeypatch):
    light = "import os, pathlib\npathlib.Path(os.environ['PRUNING_RESULTS']).mkdir(exist_ok=True)\n" \
            "(pathlib.Path(os.environ['PRUNING_RESULTS']) / (os.environ['PRUNING_RUN'] + '.json')).write_text('{}')"
    notebook(root / "notebooks" / "tiny.ipynb", "# Tiny", "fraction = 0.5\ncount = 3  # how many", light)
    for number in ("7", "8"):
        assert main.main(["run", "small", "--name", f"mine-{number}", "-p", f"count={number}"]) == 0
    (root / "book" / "_toc.yml").write_text(yaml.safe_dump({"parts": [{"caption": "Runs", "chapters": []}]}))
    (root / "pruning_lib").mkdir()
    monkeypatch.setattr(book.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 0}))
    assert main.main(["book", "--out", "build/own"]) == 0
    made = root / "build" / "own" / "book"
    assert set(json.loads((made / "_runs.json").read_text())) == {"executed/mine-7", "executed/mine-8"}
    assert {path.stem for path in (made / "executed").iterdir()} == {"mine-7", "mine-8"}
    assert all(name in (made / "_runs.md").read_text() for name in ("mine-7", "mine-8"))


def test_book_prints_the_page_to_open(root, small_is_fresh, monkeypatch, capsys):
    (root / "book" / "_toc.yml").write_text(yaml.safe_dump({"parts": [{"caption": "Runs", "chapters": []}]}))
    (root / "pruning_lib").mkdir()
    monkeypatch.setattr(book.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 0}))
    assert main.main(["book"]) == 0
    assert capsys.readouterr().out == f"{root}/build/report/book/_build/html/index.html\n"


def test_in_a_folder_that_init_laid_out_a_notebook_runs(tmp_path, monkeypatch, capsys):
    assert main.main(["init", str(tmp_path / "mine"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(tmp_path / "mine") and found["next"][-1] == "pruning-lib run amp_prune --out mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert main.main(["run", "by_hand", "--out", "own", "--json", "-q"]) == 0
    (page,) = json.loads(capsys.readouterr().out)["pages"].values()
    assert Path(page).resolve() == (tmp_path / "mine" / "own" / "executed" / "by_hand.ipynb").resolve()
    assert json.loads((tmp_path / "mine" / "own" / "results" / "by_hand.json").read_text())["values"]


def test_every_command_takes_quiet_and_json():
    commands = next(a.choices for a in main.parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    for name, command in commands.items():
        options = {option for action in command._actions for option in action.option_strings}
        assert {"--json", "-q", "--quiet"} <= options, name


def test_memory_that_runs_out_is_one_line_with_the_way_out(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loading, "load_model", full)
    assert main.main(["evaluate", "smollm2-135m-instruct", "--text", "mini_text"]) == 1
    assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB\nGive --dtype" in capsys.readouterr().err
