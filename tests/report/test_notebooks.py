"""Rules of notebooks: stored without output, prose before code, flat explained parameters, one record or none."""

import ast
import inspect
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from pruning_lib import data
from pruning_lib.data import images
from pruning_lib.evaluation import attacks, corruptions, quality, spurious_cues
from pruning_lib.experiments import runs
from pruning_lib.experiments.runs import Tree
from pruning_lib.models import loading, published_configs
from pruning_lib.models.plan import GROUPED
from pruning_lib.pruning import block_ranking, importance, pipeline, selection
from pruning_lib.training import lora


def rows_of(tree):
    """Return the rows of runs.yml; unknown notebooks, unknown parameters and values of another type are refused."""
    try:
        return runs.rows(tree)
    except SystemExit as refusal:  # which would end pytest without a report of the other tests
        pytest.fail(f"notebooks/runs.yml: {refusal}", pytrace=False)


ROOT = Path(__file__).resolve().parents[2]
TREE = Tree.at(ROOT)
ROWS = rows_of(TREE)
READINGS = {row.notebook for row in ROWS.values() if row.reading}
PATHS = sorted(TREE.notebooks.glob("*.ipynb"))
RUNS = [path for path in PATHS if path.stem not in READINGS]
DRAWS_OR_READS = {"matplotlib", "pandas", "numpy", "myst_nb", "json", "pruning_lib", "pruning_lib.experiments.records",
                  "pruning_lib.data",  # for published figures, in data/inputs
                  "pruning_lib.evaluation.quality",  # for statistics over recorded items only
                  "pruning_lib.evaluation.robustness_rule", "pruning_lib.evaluation.score_rule",
                  "pruning_lib.evaluation.storage_rule", "pruning_lib.report.storage_plots"}
OF_THE_PACKAGE = {"plots", "records", "read_record", "compare"}
STATISTICS = {"questions", "mean_interval", "paired"}
MODULES_OF_A_NOTEBOOK = 3  # the median, at most


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


def cells(path, kind=None):
    return [cell for cell in nbformat.read(path, as_version=4).cells if kind in (None, cell.cell_type)]


def tree_of(cell):
    return ast.parse(cell.source)


def code_of(path):
    """Return one syntax tree of all code cells."""
    return ast.Module([node for cell in cells(path, "code") for node in tree_of(cell).body], [])


def imported(path):
    for node in ast.walk(code_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ours = node.module.split(".")[0] == "pruning_lib"
            yield from (f"{node.module}.{a.name}" if ours else node.module for a in node.names)


def parameters_cells(path):
    return [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]


def records_written(path):
    """Return the calls of ``pl.record``."""
    return [node for node in ast.walk(code_of(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pl.record"]


def test_there_are_runs_and_readings_and_each_has_a_row():
    assert RUNS and READINGS
    assert {path.stem for path in PATHS} == {row.notebook for row in ROWS.values()}


def test_a_row_has_a_name_that_a_record_can_have_and_that_is_given_once():
    names = re.findall(r"^([^\s#][^:]*):", (TREE.notebooks / "runs.yml").read_text(), re.M)
    assert names == list(ROWS)  # YAML would silently keep the second of two equal names
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in names)


def test_two_rows_are_never_the_same_run():
    same = [(row.notebook, json.dumps({**runs.parameters_of(runs.source(row, TREE)), **row.parameters}))
            for row in ROWS.values()]
    assert len(set(same)) == len(same)


def test_a_readings_row_is_called_as_its_notebook():
    assert not [row.name for row in ROWS.values() if row.reading and row.name != row.notebook]


@every(PATHS)
def test_a_notebook_is_stored_valid_and_without_outputs(path):
    stored = json.loads(path.read_text())
    nbformat.validate(stored)
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    for cell in stored["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]


@every(PATHS)
def test_a_page_starts_with_its_one_title_and_says_something(path):
    prose = cells(path, "markdown")
    assert cells(path)[0].cell_type == "markdown" and re.match(r"# \S.*\n\n\w", cells(path)[0].source)
    assert not [cell.source for cell in prose[1:] if re.search(r"^# ", cell.source, re.M)]


@every(PATHS)
def test_prose_stands_before_code(path):
    """Allow code after code only for imports and for the last cell of a run, which writes the record."""
    everything = cells(path)
    for before, cell in zip(everything, everything[1:], strict=False):
        only_imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree_of(cell).body) \
            if cell.cell_type == "code" else False
        closing = cell is everything[-1] and "pl.record" in cell.source
        assert before.cell_type == "markdown" or cell.cell_type == "markdown" or only_imports or closing, cell.source


@every(PATHS)
def test_a_code_cell_is_short_and_shows_one_thing(path):
    listed = parameters_cells(path)  # one line each
    long = [cell.source for cell in cells(path, "code") if len(cell.source.splitlines()) > 20 and cell not in listed]
    assert not long, f"{len(long)} cell(s) of more than 20 lines: {[source.splitlines()[0] for source in long]}"


@every(PATHS)
def test_no_classes_no_long_functions_no_installs_and_no_shell(path):
    for cell in cells(path, "code"):
        for node in ast.walk(tree_of(cell)):  # a line of magic or shell is no Python and stops here
            assert not isinstance(node, (ast.ClassDef, ast.AsyncFunctionDef))
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name
        assert not re.search(r"\b(pip|conda)\b|subprocess|os\.system", cell.source), cell.source


@every(PATHS)
def test_a_cell_holds_no_absolute_path(path):
    absolute = r"(?<![\w./])(?:/|~/|[A-Z]:\\)\w[\w.-]+/"
    assert not [found for cell in cells(path) for found in re.findall(absolute, cell.source)]


@every(RUNS)
def test_the_parameters_of_a_run_are_flat_literals_each_with_a_word_on_it(path):
    (cell,) = parameters_cells(path)
    names = []
    for line in cell.source.splitlines():
        assignment, comment = line.split("  #", 1)
        (node,) = ast.parse(assignment).body
        names.append(node.targets[0].id)
        assert type(ast.literal_eval(node.value)) in (str, int, float, bool)
        assert len(comment.split()) >= 2, f"{names[-1]}: say its unit or the values allowed"
    assert names == list(runs.parameters_of(path)) and len(set(names)) == len(names)
    before = [c for c in cells(path)[:cells(path).index(cell)] if c.cell_type == "code"]
    assert not before, "the parameters come first, so that everything is computed from them"


@every(RUNS)
def test_every_parameter_is_used(path):
    used = [n.id for n in ast.walk(code_of(path)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    assert not [name for name in runs.parameters_of(path) if name not in used]


ON_THE_HUB = {"Qwen/Qwen2.5-Coder-1.5B-Instruct"}  # the rows of the report read its weights from a folder
KEYS = {"model": {"fresh", "toy", *loading.MODELS, *ON_THE_HUB}, "image_set": images.IMAGES,
        "criterion": {"none", *block_ranking.CRITERIA},
        "method": {"dense", "none", *importance.METHODS}, "calibration": data.DATASETS,
        "text": data.DATASETS, "tasks": quality.TASKS, "grouped_query": GROUPED, "dtype": loading.DTYPES,
        "reconstruction": pipeline.RECONSTRUCTIONS, "reconstruction_text": data.DATASETS,
        "cue": spurious_cues.CUES, "language_model": {"toy", "none", *loading.MODELS}}
LISTS = {"methods": importance.METHODS, "attacks": {"none", *attacks.ATTACKS}, "l2_attacks": {"none", *attacks.ATTACKS},
         "criteria": block_ranking.CRITERIA,
         "corruptions": {"all", "none", *corruptions.CORRUPTIONS}}  # names separated by spaces


@pytest.mark.parametrize("name", [*ROWS, *(path.stem for path in RUNS)])
def test_a_value_that_is_a_key_of_a_table_is_in_it(name):
    row = ROWS.get(name) or runs.defaults(TREE)[name]
    values = {**runs.parameters_of(runs.source(row, TREE)), **row.parameters}
    if row.not_run.startswith("needs") or values.get("random_weights"):  # see tests/models/test_published_configs.py
        assert values.pop("model") in published_configs.PUBLISHED_CONFIGS
    assert not {key: values[key] for key, table in KEYS.items() if key in values and values[key] not in table}
    assert all(word in table for key, table in LISTS.items() for word in values.get(key, "").split())
    assert 0 <= values.get("removed_fraction", 0) < 1


# of a page that runs in a minute, on inputs of our own
SIZES = {"calibration", "prompts", "reconstruction_text", "reconstruction_samples", "text", "tokens", "window", "dtype"}
# the page is about them, or about the cut alone
SHOWN = {("inference_speed", "heads_removed"), ("by_hand", "heads_removed"), ("fused_families", "heads_removed"),
         ("recipe", "reconstruction"), ("consensus_prune", "criterion"),
         ("prune_or_quantize", "multiple_of"), ("answers_side_by_side", "multiple_of"),
         *((name, "reconstruction") for name in ("answers_side_by_side", "calibration_draws", "prune_or_quantize"))}


def test_defaults_are_those_of_the_functions_but_for_sizes_and_for_the_subject_of_a_page():
    """Compare notebooks; functions and commands are compared in ``tests/cli/test_prune.py``."""
    signatures = [pipeline.prune, selection.choose, quality.perplexity, lora.Settings]
    functions = {name: p.default for one in signatures for name, p in inspect.signature(one).parameters.items()}
    given = {(path.stem, name): value for path in RUNS for name, value in runs.parameters_of(path).items()
             if name in functions and name not in SIZES | {"removed_fraction", "model", "batches"}}
    other = {key for key, value in given.items() if value != functions[key[1]]}
    assert other == SHOWN and len(given) > 20, other ^ SHOWN


@every(RUNS)
def test_no_number_of_a_parameter_stands_for_something_else(path):
    """Forbid -1 and 0 for "all" or "none of these"; a word says it, as in ``tokens = "all"``."""
    (cell,) = parameters_cells(path)
    sentinel = r"-1\b|\b0(:| takes| gives)? ?(all|every)"
    assert not [line for line in cell.source.splitlines() if re.search(sentinel, line.partition("  #")[2])]
    assert not [name for name, value in runs.parameters_of(path).items() if isinstance(value, int) and value < 0]


@every(RUNS)
def test_the_defaults_pass_the_runners_checks(path):
    row = runs.defaults(TREE)[path.stem]
    assert row.parameters == {} and runs.checked(row, TREE) is row
    own = runs.Row(path.stem, path.stem, runs.parameters_of(path))
    assert runs.checked(own, TREE) is own


@every(RUNS)
def test_a_run_writes_one_record_under_its_own_name_and_shows_no_path(path):
    (call,) = records_written(path)
    assert ast.literal_eval(call.args[0]) == path.stem
    keywords = {k.arg for k in call.keywords}
    assert "data" in keywords and "parameters" not in keywords  # the runner records the parameters
    assert cells(path, "code")[-1].source.rstrip().endswith(";")  # else the page shows the path of the record


@every(RUNS)
def test_a_run_carries_no_labels(path):
    """Forbid labels, because equal labels on several pages of a run break the strict build."""
    labels = r"^\([\w-]+\)=|:label:|:name:|\{#[\w-]+\}|\\label"
    assert not [cell.source for cell in cells(path, "markdown") if re.search(labels, cell.source, re.M)]


@every([path for path in PATHS if path.stem in READINGS])
def test_a_reading_has_no_parameters_writes_no_record_and_computes_no_model(path):
    assert not parameters_cells(path) and not records_written(path)
    assert not {name for name in imported(path) if name not in DRAWS_OR_READS
                and name.split(".")[0] not in DRAWS_OR_READS}
    used = {node.attr for node in ast.walk(code_of(path)) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == "quality"}
    assert used <= STATISTICS
    public = {node.attr for node in ast.walk(code_of(path)) if isinstance(node, ast.Attribute)
              and ast.unparse(node.value) == "pl"}
    assert public <= OF_THE_PACKAGE
    assert public & {"records", "read_record"} or {"records", "data"} & {
        ast.unparse(node.value) for node in ast.walk(code_of(path)) if isinstance(node, ast.Attribute)}


def test_a_notebook_imports_few_modules_of_the_package():
    ours = [[name for name in imported(path) if name.split(".")[0] == "pruning_lib"] for path in PATHS]
    assert statistics.median(map(len, ours)) <= MODULES_OF_A_NOTEBOOK


MAKES_A_MODEL = {"amp_prune", "consensus_prune", "consensus_scores", "fused_families", "language_blocks", "recipe",
                 "zero_shot"}


@every(RUNS)
def test_a_run_that_makes_a_model_saves_it_if_asked(path):
    assert (runs.parameters_of(path).get("save_to") == "") == (path.stem in MAKES_A_MODEL)
