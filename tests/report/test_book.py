"""Faults that the builder does not report: missing, failed or outdated pages, and broken quotes."""

import ast
import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml
from test_notebooks import rows_of

from pruning_lib import data
from pruning_lib.experiments import runs, staleness
from pruning_lib.experiments.runs import Tree
from pruning_lib.report import book

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
TREE = Tree.at(ROOT)
EVERY_ROW = rows_of(TREE)
ROWS = {name: row for name, row in EVERY_ROW.items() if not row.not_run}  # the others have no page
RUNS = [name for name, row in ROWS.items() if not row.reading]
CHAPTERS = sorted((BOOK / "chapters").glob("*.md"))
PROSE = [*CHAPTERS, *sorted(TREE.notebooks.glob("*.ipynb"))]
every_row = pytest.mark.parametrize("name", ROWS)
every_run = pytest.mark.parametrize("name", RUNS)

MADE_WITH = {"commit": r"[0-9a-f]{7,40}(\+changes)?", "torch": r"\d+\.\d+.*", "transformers": r"\d+\.\d+.*",
             "lm-eval": r"\d+\.\d+.*", "python": r"3\.\d+\.\d+", "device": r".*\w.*", "threads": r"[1-9]\d*",
             "minutes": r"\d+(\.\d+)?", "data": r"\{.*\}"}
VERDICTS = {"reproduced", "partly", "not at this scale", "partly contradicted", "contradicted", "no difference",
            "not run"}
PARTS = {"robustness": ("test",), "shortcut": ("test",), "emissions": ("test",), "published": ("test",),
         "attack_sweep": ("test",), "removal_order": ("calibration",)}
NO_DATA = {"block_costs", "by_hand", "inference_speed", "metrics_forgive", "scoring_cost"}  # random weights, numbers
OF_A_MACHINE = r"(?<![\w.~)/-])/(?:work|tmp|home|root|Users|mnt|scratch|opt|usr|var|data)(?:/|\b)|[A-Z]:\\\\?Users|file://"
HOSTS = {"arxiv.org", "doi.org", "github.com", "huggingface.co", "www.w3.org"}  # allowed targets of links


def read_page(name):
    path = TREE.pages / f"{name}.ipynb"
    assert path.is_file(), f"no page; make it with: pruning-lib run {name}"
    return nbformat.read(path, as_version=4)


def read_record(name):
    path = TREE.records / f"{name}.json"
    assert path.is_file(), f"no record; make it with: pruning-lib run {name}"
    return json.loads(path.read_text())


def injected(cell):
    return "injected-parameters" in cell.metadata.get("tags", [])


def code(page):
    return [cell for cell in page.cells if cell.cell_type == "code"]


def parameters(name):
    """Return all parameters of a row: the defaults of its notebook, and its own."""
    row = ROWS[name]
    return {**runs.parameters_of(runs.source(row, TREE)), **row.parameters}


def prose(path):
    """Return the prose of a chapter or a notebook without code blocks."""
    if path.suffix == ".ipynb":
        return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    return re.sub(r"^```(?:python|text|json|yaml)\n.*?^```", "", path.read_text(), flags=re.M | re.S)


def stem(path):
    return path.stem


# --- pages ------------------------------------------------------------------------------------------------------------


@every_row
def test_the_page_in_the_book_is_the_notebook_as_it_is_now(name):
    source, page = nbformat.read(runs.source(ROWS[name], TREE), as_version=4), read_page(name)
    own = [cell for cell in book.refresh_prose(page, source) if not injected(cell)]
    assert [(c.cell_type, c.source) for c in own] == [(c.cell_type, c.source) for c in source.cells]


@every_row
def test_the_page_was_run_with_the_parameters_of_its_row(name):
    page, wanted = read_page(name), dict(ROWS[name].parameters)
    assert page.metadata["pruning_lib"]["parameters"] == wanted
    assert page.metadata["pruning_lib"]["row"] == name
    assert page.metadata["pruning_lib"]["notebook"] == ROWS[name].notebook
    assignments = [node for cell in code(page) if injected(cell) for node in ast.parse(cell.source).body]
    given = {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}
    assert {k: (v, type(v)) for k, v in given.items()} == {k: (v, type(v)) for k, v in wanted.items()}


@every_row
def test_every_cell_of_the_page_was_run_in_order_and_none_failed(name):
    page = read_page(name)
    nbformat.validate(page)
    ran = [cell.execution_count for cell in code(page) if cell.source.strip()]
    assert ran == list(range(1, len(ran) + 1))
    outputs = [out for cell in code(page) for out in cell.outputs]
    assert outputs and not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]


@every_row
def test_the_runner_says_that_the_row_is_up_to_date(name):
    assert staleness.stale_reason(ROWS[name], TREE) == ""


def test_there_is_no_page_and_no_record_without_a_row():
    assert {path.stem for path in TREE.pages.iterdir()} <= set(ROWS)
    assert {path.stem for path in TREE.records.iterdir()} <= set(RUNS)
    assert {path.suffix for path in TREE.pages.iterdir()} == {".ipynb"}
    assert {path.suffix for path in TREE.records.iterdir()} == {".json"}


# --- records ----------------------------------------------------------------------------------------------------------


@every_run
def test_the_record_is_of_this_row_with_its_parameters_and_holds_numbers(name):
    record = read_record(name)
    assert (record["run"], record["notebook"]) == (name, ROWS[name].notebook)
    assert record["parameters"] == parameters(name)
    assert record["values"] and any(isinstance(v, (int, float)) for v in record["values"].values())


@every_run
def test_the_record_says_what_it_was_made_with(name):
    made_with = read_record(name)["made_with"]
    local = made_with.pop("local_weights", {})  # of models from a folder instead of the hub
    assert all(re.fullmatch("[0-9a-f]{16}", weights) for weights in local.values())
    assert set(made_with) == set(MADE_WITH)
    assert not {key: made_with[key] for key, form in MADE_WITH.items() if not re.fullmatch(form, str(made_with[key]))}


@every_run
def test_the_record_holds_a_fingerprint_of_every_data_set_the_run_read(name):
    keys = {"calibration", "text"}
    given = parameters(name)
    if given.get("reconstruction", "none") != "none" or given.get("method") == "reconstruction_error":
        keys.add("reconstruction_text")
    read = {v for k, v in parameters(name).items() if k in keys and v in data.DATASETS}
    if "image_set" in parameters(name):  # analyses of networks of other runs compute no scores
        parts = PARTS.get(ROWS[name].notebook, ("scored", "test"))
        read |= {f"{parameters(name)['image_set']}-{part}" for part in parts}
    if parameters(name).get("recovery_pairs"):
        read.add("recovery")
    fingerprints = read_record(name)["made_with"]["data"]
    assert set(fingerprints) == read and bool(read) != (ROWS[name].notebook in NO_DATA)
    assert all(re.fullmatch(r"[0-9a-f]{16}", text) for text in fingerprints.values())


def test_records_of_the_same_samples_have_the_same_fingerprint():
    """Require equal data for rows that are compared."""
    seen = {}
    for name in RUNS:
        if (TREE.records / f"{name}.json").is_file():
            given = parameters(name)
            for key in ("calibration", "text"):
                if key in given:
                    solves = given.get("reconstruction", "none") != "none"
                    solved_on = given.get("reconstruction_text") if solves else None
                    count = given.get("reconstruction_samples" if solved_on == given[key] else "prompts")
                    count = (count, given.get("draws"))  # the first ones, or so many draws of as many
                    sample = (given[key], count if key == "calibration" else ROWS[name].notebook)
                    seen.setdefault(sample, set()).add(read_record(name)["made_with"]["data"].get(given[key]))
    assert seen and not {sample: found for sample, found in seen.items() if len(found) > 1}


# --- chapters ---------------------------------------------------------------------------------------------------------


def listed():
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text())
    return [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]


def test_every_file_of_the_contents_exists_and_every_chapter_and_reading_is_in_it_once():
    names = listed()
    assert len(set(names)) == len(names)
    assert not [name for name in names if not any((BOOK / f"{name}{end}").is_file() for end in (".md", ".ipynb"))]
    chapters = {f"chapters/{path.stem}" for path in (BOOK / "chapters").iterdir()}
    readings = {f"executed/{name}" for name, row in ROWS.items() if row.reading}
    in_every_build = {f"executed/{name}" for name, row in ROWS.items() if row.notebook == name}
    assert chapters | readings <= set(names) <= chapters | in_every_build
    assert "chapters/runs" in names  # which lists the pages of runs; they are not in the contents themselves


def glued(page):
    """Return name -> glued text of a page."""
    return {out.metadata["scrapbook"]["name"]: str(next(iter(out.data.values()))) for cell in code(page)
            for out in cell.outputs if "scrapbook" in out.get("metadata", {})}


def quotes():
    """Yield (file, page, key) of every glued value quoted by a chapter or a reading."""
    for path in PROSE:
        found = re.findall(r"\{glue:\w*\}`([^`]+)`|\{glue\}`([^`]+)`", prose(path))
        blocks = re.findall(r"[`:]{3,}\{glue:?\w*\}\s+(\S+)(?:\n:doc:\s*(\S+))?", prose(path))
        for text in [*(a or b for a, b in found), *(f"{doc}::{key}" if doc else key for key, doc in blocks)]:
            page, _, rest = text.rpartition("::") if "::" in text else (path.name, "", text)
            yield path, (BOOK / "chapters" / page).resolve() if "/" in page else TREE.pages / page, rest.split(":")[0]


def test_what_chapters_quote_is_glued_in_the_page_they_name_and_is_a_number():
    found = list(quotes())
    assert found, "the chapters quote nothing"
    for path, page, key in found:
        assert page.parent == TREE.pages and ROWS[page.stem].notebook == page.stem, \
            f"{path.name} quotes {page}: quote a reading, or a run whose row is called as its notebook"
        shown = glued(read_page(page.stem))
        assert key in shown, f"{path.name} quotes {key!r}, {page.name} glues: {', '.join(sorted(shown))}"
        if key.endswith("_verdict"):
            assert shown[key].strip("'") in VERDICTS, f"{path.name} quotes {key!r}, which is {shown[key]}"
        elif not key.endswith("_number"):  # of a claim: words, where there is no number yet
            assert re.search(r"\d", shown[key]), f"{path.name} quotes {key!r}, which is {shown[key]}"


def test_what_is_cited_is_in_the_bibliography_once():
    entries = re.findall(r"^@\w+\{\s*([^,\s]+)", (BOOK / "references.bib").read_text(), re.M)
    assert len(set(entries)) == len(entries)
    cited = {key.strip() for path in PROSE for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(path))
             for key in keys.split(",")}
    assert cited and cited <= set(entries)


@pytest.mark.parametrize("path", PROSE, ids=stem)
def test_every_link_leads_to_a_page_that_every_build_of_the_book_has(path):
    """Allow links only to pages of every build; `make reproduce` has no pages of the report's rows."""
    folder = BOOK / "executed" if path.suffix == ".ipynb" else path.parent
    names = set(listed()) | {f"executed/{name}" for name in RUNS if ROWS[name].notebook == name}
    for target in re.findall(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        page = (folder / file).resolve() if file else None
        if page:
            assert page.is_file(), f"{target}: no such file"
            assert page.is_relative_to(BOOK) and str(page.relative_to(BOOK).with_suffix("")) in names, target
        if anchor:
            headings = re.findall(r"^#{1,3} (.+)$", prose(page or path), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}: headings are {sorted(slugs)}"


@pytest.mark.parametrize("path", CHAPTERS, ids=stem)
def test_code_that_a_chapter_prints_from_the_library_is_there(path):
    blocks = re.findall(r"```\{literalinclude\} (\S+)\n(.*?)```", path.read_text(), re.S)
    for file, options in blocks:
        source = (path.parent / file).resolve()
        assert source.is_relative_to(ROOT / "pruning_lib"), "the builder's copy holds the book and the library only"
        names = {node.name for node in ast.parse(source.read_text()).body if hasattr(node, "name")}
        assert set(re.findall(r":pyobject: (\w+)", options)) <= names, f"{file} has no such function"


# --- what is published ------------------------------------------------------------------------------------------------


def public_text(path):
    """Return the visible text of a file, without the bytes of images."""
    if path.suffix != ".ipynb":
        return path.read_text()
    page = nbformat.read(path, as_version=4)
    for cell in code(page):
        for out in cell.outputs:
            for kind in [kind for kind in out.get("data", {}) if kind in ("image/png", "image/jpeg")]:
                del out.data[kind]
    return nbformat.writes(page)


PUBLIC = [*sorted(TREE.pages.glob("*.ipynb")), *sorted(TREE.records.glob("*.json")), *PROSE, BOOK / "_config.yml",
          BOOK / "references.bib", *(ROOT / n for n in ("requirements.lock", "README.md", "environment.yml", "Makefile",
                                                        "pyproject.toml", "notebooks/runs.yml", ".ci/run"))]


@pytest.mark.parametrize("path", PUBLIC, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_published_names_a_path_of_a_machine_or_a_place_packages_came_from(path):
    text = public_text(path)
    text = text.replace("#!/usr/bin/env", "")
    assert not re.findall(OF_A_MACHINE, text)
    assert not re.findall(r"(?i)index-url|find-links|trusted-host|\bpypi\b|\bartifactory\b|\bnexus\b", text)
    assert set(re.findall(r"https?://([\w.-]+)", text)) <= HOSTS


@pytest.mark.parametrize("text", ["saved in /tmp/x", "'/home/me/model'", "(/root/.cache)", 'at "/work/net"'])
def test_a_path_of_a_machine_would_be_found_and_one_of_the_repository_not(text):
    assert re.findall(OF_A_MACHINE, text)
    assert not re.findall(OF_A_MACHINE, "path/to/tmp/folder, and/or, ../data/results, build/home")


def test_no_file_in_git_is_larger_than_a_megabyte_and_no_network_than_four():
    git = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                         capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout; a clone has this test")
    files = [ROOT / name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]
    most = {ROOT / "data" / "networks": 4e6}  # a ResNet-56 in float32
    assert len(files) > 50 and not [(path.name, path.stat().st_size) for path in files
                                    if path.stat().st_size > most.get(path.parent.parent, 1e6)]
