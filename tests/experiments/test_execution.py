"""Rows run for real, page and record appear together or not at all, and outdated pages are detected.

Kernels start slowly, so each kind of run is executed once in its own small tree and shared by several tests.
"""

import json
import os
import shutil

import nbformat
import pytest
import yaml
from nbformat import v4

from pruning_lib.experiments import execution, runs, staleness
from pruning_lib.experiments.execution import RowFailed
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.report import book

PARAMETERS = '''fraction = 0.5   # of all parameters, 0 to 1
count = 3        # how many
name = "amp"     # any word
flag = False     # True or False'''
RECORDS = '''import sys
from pruning_lib.experiments import records
print("count is", count)
print("noise", records.__file__, file=sys.stderr)
records.write("tiny", values={"twice": 2 * fraction});'''
READS = 'from pruning_lib.experiments import records\nrecords.read("small")["run"]'
FAILS = 'if name == "bad":\n    raise ValueError("boom")'
ROWS = {
    "small": {"notebook": "tiny", "parameters": {"fraction": 1, "count": 7}},
    "plain": {"notebook": "tiny"},
    "mute": {"notebook": "silent"},
    "look": {"notebook": "look", "reading": True},
}


def notebook(path, *cells):
    """Write a notebook of prose (starting with #) and code; the parameters cell is tagged."""
    made = [v4.new_markdown_cell(c) if c.startswith("# ") else
            v4.new_code_cell(c, metadata={"tags": ["parameters"]} if "# how many" in c else {}) for c in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=made, metadata={"kernelspec": kernel}), path)


def without_digests(path):
    """Return a stored page as the site ships it: what its code was is for the runner, not for readers."""
    page = json.loads(path.read_text())
    assert page["metadata"]["pruning_lib"].pop("code")
    return page


def make_tree(root):
    notebook(root / "notebooks" / "tiny.ipynb", "# Tiny", PARAMETERS, RECORDS, FAILS)
    notebook(root / "notebooks" / "silent.ipynb", "# Silent", PARAMETERS)
    notebook(root / "notebooks" / "dies.ipynb", "# Dies", "import os", "os._exit(1)")
    notebook(root / "notebooks" / "look.ipynb", "# Look", READS)
    (root / "notebooks" / "runs.yml").write_text(yaml.safe_dump(ROWS, sort_keys=False))
    return Tree.at(root)


def published(tree):
    """Return name -> bytes of all files under pages and records, including incomplete ones."""
    return {path.name: path.read_bytes() for folder in (tree.pages, tree.records) if folder.exists()
            for path in folder.iterdir()}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return a read-only tree after real runs of ``small`` and ``look``, with user variables set."""
    tree = make_tree(tmp_path_factory.mktemp("executed"))
    rows = runs.rows(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_RUN", "the user's")
        patch.delenv("PRUNING_RESULTS", raising=False)
        for name in ("small", "look"):
            assert execution.run(rows[name], tree, log=print) == tree.pages / f"{name}.ipynb"
        assert os.environ["PRUNING_RUN"] == "the user's" and "PRUNING_RESULTS" not in os.environ
    return tree


@pytest.fixture
def tree(executed, tmp_path):
    """Return a copy of that tree."""
    root = shutil.copytree(executed.notebooks.parent, tmp_path / "copy")
    return Tree.at(root)


@pytest.fixture(scope="module")
def failed(executed, tmp_path_factory):
    """Return (tree, error) after a second run of ``small`` whose last cell fails, after it wrote a record."""
    tree = Tree.at(shutil.copytree(executed.notebooks.parent, tmp_path_factory.mktemp("failed") / "copy"))
    with pytest.raises(RowFailed) as error:
        execution.run(Row("small", "tiny", {"name": "bad"}), tree)
    return tree, str(error.value)


@pytest.fixture
def no_kernel(monkeypatch):
    """Replace execution by writing a page and a record, without a kernel."""

    def execute(row, tree, page):
        notebook(page, "# New page")
        records = execution.Path(os.environ["PRUNING_RESULTS"])
        assert os.environ["PRUNING_RECORDS"] == str(tree.records.resolve()) != str(records)
        records.mkdir(exist_ok=True)
        (records / f"{os.environ['PRUNING_RUN']}.json").write_text('{"new": true}')

    monkeypatch.setattr(execution, "_execute", execute)


# --- a run that goes well ---------------------------------------------------------------------------------------------


def test_the_page_is_the_notebook_executed_with_the_rows_parameters(executed):
    page = nbformat.read(executed.pages / "small.ipynb", as_version=4)
    nbformat.validate(page)
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    injected = code.pop(1)
    assert injected.metadata.tags == ["injected-parameters"]
    assert injected.source.split() == "# Parameters fraction = 1 count = 7".split()
    assert [cell.source for cell in code] == [PARAMETERS, RECORDS, FAILS]
    assert [cell.execution_count for cell in code] == [1, 3, 4]
    assert code[1].outputs[0].text == "count is 7\n"


def test_the_record_of_a_run_is_under_its_rows_name_with_the_parameters_it_really_had(executed):
    record = json.loads((executed.records / "small.json").read_text())
    assert (record["run"], record["notebook"]) == ("small", "tiny")
    assert record["parameters"] == {"fraction": 1, "count": 7, "name": "amp", "flag": False}
    assert record["values"] == {"twice": 2}
    assert {"commit", "torch", "device", "minutes"} <= set(record["made_with"])


def test_a_reading_finds_the_published_records_and_leaves_none(executed):
    page = nbformat.read(executed.pages / "look.ipynb", as_version=4)
    assert page.cells[-1].outputs[0].data["text/plain"] == "'small'"
    assert sorted(published(executed)) == ["look.ipynb", "small.ipynb", "small.json"]


def test_a_page_holds_no_path_of_this_machine_no_noise_and_no_times(executed):
    places = [executed.notebooks.parent, execution.__file__.removesuffix("execution.py")]
    for page in executed.pages.iterdir():
        assert not [place for place in places if str(place) in page.read_text()]
        assert not [word for word in ("papermill", "iopub", "start_time", "stderr\"") if word in page.read_text()]


def test_nothing_is_left_lying_about_after_a_run_that_went_well(executed):
    assert not list(executed.failed.iterdir())


# --- runs that do not -------------------------------------------------------------------------------------------------


def test_a_failing_cell_is_named_with_its_error_and_where_the_partial_page_is(failed):
    tree, message = failed
    assert "row small failed in cell " in message and "ValueError: boom" in message
    partial = tree.failed / "small.ipynb"
    assert str(partial) in message and [path.name for path in tree.failed.iterdir()] == ["small.ipynb"]
    cells = nbformat.read(partial, as_version=4).cells
    assert any("count is 3" in out.get("text", "") for cell in cells for out in cell.get("outputs", []))
    assert any(out.output_type == "error" for cell in cells for out in cell.get("outputs", []))


def test_the_cell_that_is_named_is_the_one_that_failed(failed):
    tree, message = failed
    number = int(message.split("in cell ")[1].split(":")[0])
    shown = nbformat.read(tree.failed / "small.ipynb", as_version=4).cells
    own = [cell for cell in shown if not any(t.startswith("papermill-error") for t in cell.metadata.get("tags", []))]
    assert own[number].source == FAILS


def test_a_failed_run_leaves_page_and_record_byte_for_byte_as_they_were(failed, executed):
    assert published(failed[0]) == published(executed)


def test_the_partial_page_goes_when_the_row_succeeds(tree, no_kernel):
    tree.failed.mkdir(parents=True, exist_ok=True)
    (tree.failed / "small.ipynb").write_text("of an earlier run")
    execution.run(runs.rows(tree)["small"], tree, log=str)
    assert not list(tree.failed.iterdir())


def test_a_run_that_writes_no_record_is_refused_with_the_way_out(tree):
    with pytest.raises(RowFailed, match="row mute: silent wrote no record; .*records.write.*reading: true"):
        execution.run(runs.rows(tree)["mute"], tree)
    assert not {"mute.ipynb", "mute.json"} & set(published(tree))


def test_kernels_talk_through_files_for_two_may_take_the_same_port():
    found = execution._reached_through("/tmp/kernel-abc")
    assert found.KernelManager.transport == "ipc" and found.KernelManager.ip.startswith("/tmp/kernel-abc/")
    assert not execution._reached_through(60 * "/tmp")  # the path of the socket would be too long, so ports are used


def test_a_kernel_that_dies_is_reported_and_publishes_nothing(tree):
    before = published(tree)
    with pytest.raises(RowFailed, match="row small failed because its kernel died"):
        execution.run(Row("small", "dies", {}), tree)
    assert published(tree) == before and (tree.failed / "small.ipynb").is_file()


def test_a_kernel_that_dies_while_it_starts_is_lost_so_that_the_row_may_be_run_again(tree, tmp_path, monkeypatch):
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "ipykernel_launcher.py").write_text("raise SystemExit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "early"))
    with pytest.raises(execution.WorkerDied, match="row small failed because its kernel died"):
        execution.run(runs.rows(tree)["small"], tree)


@pytest.mark.parametrize("full", ["small.json", "small.ipynb"])
def test_page_and_record_are_both_old_or_both_new_when_the_disk_is_full(tree, no_kernel, monkeypatch, full):
    before = published(tree)

    def copy(source, target, real=shutil.copyfile):
        if execution.Path(source).name == full:
            execution.Path(target).write_text("half")
            raise OSError("no space left on device")
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(OSError, match="no space left"):
        execution.run(runs.rows(tree)["small"], tree)
    assert published(tree) == before
    monkeypatch.undo()


def test_a_new_run_replaces_page_and_record(tree, no_kernel):
    before = published(tree)
    path = execution.run(runs.rows(tree)["small"], tree, log=str)
    after = published(tree)
    assert path == tree.pages / "small.ipynb" and sorted(after) == sorted(before)
    assert after["small.json"] == b'{"new": true}' and b"New page" in after["small.ipynb"]
    assert after["look.ipynb"] == before["look.ipynb"]


# --- what is refused before anything runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("parameters", "message"), [
    ({"fractoin": 0.1}, "tiny has no parameter 'fractoin'; it has: fraction, count, name, flag"),
    ({"count": "3"}, "parameter count takes int like 3, got '3'"),
    ({"count": 3.0}, "parameter count takes int like 3, got 3.0"),
    ({"count": True}, "parameter count takes int like 3, got True"),
    ({"fraction": True}, "parameter fraction takes float like 0.5, got True"),
    ({"fraction": "0.1"}, "parameter fraction takes float"),
    ({"flag": 1}, "parameter flag takes bool like False, got 1"),
    ({"name": None}, "parameter name takes str like 'amp', got None"),
    ({"count": [3]}, r"parameter count takes int like 3, got \[3\]")])
def test_an_unknown_parameter_or_a_value_of_another_type_is_refused_before_anything_runs(tmp_path, parameters, message):
    tree = make_tree(tmp_path)
    row = Row("small", "tiny", parameters)
    for act in (lambda: execution.run(row, tree), lambda: runs.checked(row, tree)):
        with pytest.raises(SystemExit, match=f"row small: .*{message}"):
            act()
    entry = {"small": {"notebook": "tiny", "parameters": parameters}}
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump(entry))
    with pytest.raises(SystemExit, match=f"row small: .*{message}"):
        runs.rows(tree)
    assert not published(tree) and not tree.failed.exists()


def test_a_whole_number_does_for_a_fraction_and_right_types_pass(tmp_path):
    tree = make_tree(tmp_path)
    row = Row("small", "tiny", {"fraction": 1, "count": 0, "name": "", "flag": True})
    assert runs.checked(row, tree) is row


@pytest.mark.parametrize(("entry", "message"), [
    ({"notebook": "tiny", "parametres": {}}, "row new: wanted notebook, parameters, reading; got .*'parametres'"),
    ({"parameters": {}}, "row new: wanted notebook"), (None, "row new: wanted notebook"),
    ({"notebook": "tini"}, "row new: no notebook 'tini'; available: dies, look, silent, tiny"),
    ({"notebook": "look", "reading": True, "parameters": {"count": 1}}, "row new: look has no parameter 'count'")])
def test_a_row_that_makes_no_sense_is_named_with_what_is_wrong(tmp_path, entry, message):
    tree = make_tree(tmp_path)
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump({**ROWS, "new": entry}))
    with pytest.raises(SystemExit, match=message):
        runs.rows(tree)


def test_defaults_are_each_notebook_once_without_parameters_and_readings_last(tmp_path):
    tree = make_tree(tmp_path)
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump({"look": ROWS["look"], **ROWS}, sort_keys=False))
    assert list(runs.defaults(tree).values()) == [
        Row("tiny", "tiny", {}), Row("silent", "silent", {}), Row("look", "look", {}, reading=True)]


def test_a_folder_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no notebooks/runs.yml; call from the repository, or give --root"):
        Tree.at(tmp_path)


# --- staleness --------------------------------------------------------------------------------------------------------


def stale(tree):
    return {name: why for name, row in runs.rows(tree).items() if (why := staleness.stale_reason(row, tree))}


def edit(path, change):
    read = nbformat.read(path, as_version=4)
    change(read)
    nbformat.write(read, path)


NEVER_RAN = {"plain": "no page yet", "mute": "no page yet"}


def test_what_ran_is_fresh_and_what_did_not_has_no_page(tree):
    assert stale(tree) == NEVER_RAN


def test_another_value_in_runs_yml_makes_a_row_stale(tree):
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump({**ROWS, "small": {"notebook": "tiny", "parameters": {
        "fraction": 1, "count": 8}}}))
    assert stale(tree) == {**NEVER_RAN, "small": "notebook or parameters changed"}


@pytest.mark.parametrize("cell", [1, 2, 3])
def test_other_code_in_any_cell_makes_the_rows_of_a_notebook_stale_and_another_remark_does_not(tree, cell):
    path = tree.notebooks / "tiny.ipynb"
    edit(path, lambda read: read.cells[cell].update(source=read.cells[cell].source + "\n# a remark"))
    assert stale(tree) == NEVER_RAN
    edit(path, lambda read: read.cells[cell].update(source=read.cells[cell].source + "\nx = 1"))
    assert stale(tree) == {**NEVER_RAN, "small": "notebook or parameters changed"}


def test_a_page_that_is_gone_or_has_no_record_is_stale(tree):
    (tree.records / "small.json").rename(tree.records / "other.json")
    assert stale(tree)["small"] == "no record"
    (tree.pages / "small.ipynb").unlink()
    assert stale(tree)["small"] == "no page yet"


def test_another_record_makes_readings_stale_and_no_run(tree):
    record = tree.records / "small.json"
    record.write_text(record.read_text().replace('"twice": 2', '"twice": 3'))
    assert stale(tree) == {**NEVER_RAN, "look": "notebook or a record changed"}
    (tree.records / "more.json").write_text("{}")
    assert stale(tree) == {**NEVER_RAN, "look": "notebook or a record changed"}


def test_a_reading_whose_own_cells_changed_does_not_blame_the_records(tree):
    edit(tree.notebooks / "look.ipynb", lambda read: read.cells[1].update(source="pass"))
    assert stale(tree)["look"].startswith("notebook")


def test_order_of_parameters_and_outputs_left_in_a_notebook_do_not_make_a_row_stale(tree):
    entry = {"notebook": "tiny", "parameters": {"count": 7, "fraction": 1}}
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump({**ROWS, "small": entry}, sort_keys=False))
    edit(tree.notebooks / "tiny.ipynb", lambda read: read.cells[3].update(execution_count=9))
    assert stale(tree) == NEVER_RAN


# --- the book ---------------------------------------------------------------------------------------------------------

CONTENTS = {"format": "jb-book", "root": "chapters/intro", "parts": [
    {"caption": "AMP", "chapters": [{"file": "chapters/amp"}, {"file": "executed/look"}]},
    {"caption": "Runs", "chapters": []}]}


@pytest.fixture
def builder(tree, monkeypatch):
    """Return the intercepted calls of jupyter-book; each returns ``builder.status``."""

    class Builder(list):
        status = 0

        def run(self, command, env):
            self.append((command, env))
            return type("Done", (), {"returncode": self.status})

    root, calls = tree.notebooks.parent, Builder()
    (root / "book" / "chapters").mkdir(parents=True)
    (root / "book" / "chapters" / "intro.md").write_text("# Intro")
    (root / "book" / "_toc.yml").write_text(yaml.safe_dump(CONTENTS, sort_keys=False))
    (root / "pruning_lib").mkdir()
    (root / "pruning_lib" / "amp.py").write_text("quoted = 1")
    monkeypatch.setattr(book.subprocess, "run", calls.run)
    return calls


def listed_runs(index):
    """Return the runs that the chapter of runs lists, in its order."""
    return list(json.loads((index.parents[2] / "_runs.json").read_text()))


def test_the_published_book_lists_each_run_that_has_a_page_in_order_of_the_rows(tree, builder):
    shutil.copyfile(tree.pages / "small.ipynb", tree.pages / "mute.ipynb")
    shutil.copyfile(tree.pages / "small.ipynb", tree.pages / "of_no_row.ipynb")
    root = tree.notebooks.parent
    left_over = root / "build" / "report" / "book" / "left_over.md"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    index = book.build_book(root)
    assert index == root / "build" / "report" / "book" / "_build" / "html" / "index.html"
    assert listed_runs(index) == ["executed/small", "executed/mute"]
    assert yaml.safe_load((root / "book" / "_toc.yml").read_text()) == CONTENTS  # the source is unchanged
    copied = {str(path.relative_to(root / "build" / "report")) for path in (root / "build" / "report").rglob("*.*")}
    assert {"book/chapters/intro.md", "book/executed/small.ipynb", "pruning_lib/pruning/amp.py"} <= copied
    assert not left_over.exists()


def test_new_prose_needs_no_run_and_stands_beside_the_numbers_there_are(tree, builder):
    root = tree.notebooks.parent
    edit(tree.notebooks / "tiny.ipynb", lambda read: read.cells[0].update(source="# Other words"))
    edit(tree.notebooks / "tiny.ipynb", lambda read: read.cells.insert(1, nbformat.v4.new_markdown_cell("And more.")))
    assert stale(tree) == NEVER_RAN
    kept, built = (nbformat.read(folder / "small.ipynb", as_version=4).cells
                   for folder in (tree.pages, book.build_book(root).parents[2] / "executed"))
    assert [cell.source for cell in built[:2]] == ["# Other words", "And more."] and built[2:] == kept[1:]


def test_prose_about_other_code_stays_with_that_code(tree, builder):
    edit(tree.notebooks / "tiny.ipynb", lambda read: [cell.update(source=f"{cell.source}\n#") for cell in read.cells])
    built = book.build_book(tree.notebooks.parent).parents[2] / "executed" / "small.ipynb"
    assert json.loads(built.read_text()) == without_digests(tree.pages / "small.ipynb")


def test_a_warning_is_an_error_and_no_notebook_is_run_by_the_builder(tree, builder):
    root = tree.notebooks.parent
    book.build_book(root)
    (command, env), = builder
    assert command[1:] == ["build", str(root / "build" / "report" / "book"), "-n", "-W", "--keep-going", "-q"]
    assert env["PRUNING_RESULTS"] == str(tree.records)
    builder.status = 1
    with pytest.raises(SystemExit, match="not built cleanly"):
        book.build_book(root)


def test_a_book_of_ones_own_pages_lists_them_under_their_notebooks_names(tree, builder):
    root = tree.notebooks.parent
    own = root / "build" / "reproduce"
    for name in ("tiny", "look"):
        notebook(own / "executed" / f"{name}.ipynb", "# Mine")
    (own / "results").mkdir()
    index = book.build_book(root, own)
    assert index.is_relative_to(own) and "Mine" in (index.parents[2] / "executed" / "look.ipynb").read_text()
    assert listed_runs(index) == ["executed/tiny"]
    assert builder[0][1]["PRUNING_RESULTS"] == str(own / "results")
    assert not (index.parents[2] / "executed" / "small.ipynb").exists()


def test_a_page_of_ones_own_alone_makes_a_book_with_the_published_readings(tree, builder):
    """Require published readings, because chapters quote and link to them."""
    root = tree.notebooks.parent
    notebook(root / "build" / "own" / "executed" / "tiny.ipynb", "# Mine")
    executed = book.build_book(root, root / "build" / "own").parents[2] / "executed"
    assert sorted(path.name for path in executed.iterdir()) == ["look.ipynb", "tiny.ipynb"]
    assert json.loads((executed / "look.ipynb").read_text()) == without_digests(tree.pages / "look.ipynb")


def test_a_published_run_that_chapters_may_link_to_is_listed_in_a_book_of_ones_own_too(tree, builder):
    """Require every page in the table of contents; a link to an unlisted page breaks the strict build."""
    root = tree.notebooks.parent
    table = {**ROWS, "silent": {"notebook": "silent"}}
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump(table, sort_keys=False))
    notebook(tree.pages / "silent.ipynb", "# Published")
    notebook(root / "build" / "own" / "executed" / "tiny.ipynb", "# Mine")
    index = book.build_book(root, root / "build" / "own")
    assert "Published" in (index.parents[2] / "executed" / "silent.ipynb").read_text()
    assert listed_runs(index) == ["executed/tiny", "executed/silent"]


def test_a_book_without_pages_says_how_to_make_them(tree, builder):
    with pytest.raises(SystemExit, match="no pages .*nowhere.*pruning-lib run"):
        book.build_book(tree.notebooks.parent, tree.notebooks.parent / "nowhere")
    assert not builder
