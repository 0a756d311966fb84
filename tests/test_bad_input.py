"""Thousands of invalid inputs: each ends in success or in one clear error, and none writes outside its folder."""

import json
import shutil
from collections import Counter
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
import yaml
from conftest import build, image_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_execution import make_tree, notebook

from pruning_lib import data
from pruning_lib.cli import main, run
from pruning_lib.data import sources
from pruning_lib.experiments import execution, input_digests, records, staleness
from pruning_lib.experiments import runs as rows
from pruning_lib.experiments.runs import Row
from pruning_lib.models import families, image_networks, loading
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.plan import GROUPED, Plan
from pruning_lib.pruning import selection
from pruning_lib.pruning.selection import Importance

CLEAR = (ValueError, SystemExit)
CASES = {"runs": 300, "entries": 250, "parameters": 300, "records": 400, "edited": 200, "plans": 300, "choices": 250,
         "scores": 100, "texts": 200, "networks": 200, "configs": 150}
RAN: Counter = Counter()
WORDS = st.sampled_from(["tiny", "look", "../tiny", "/etc/passwd", "notebook", "parameters", "reading", "count",
                         "a" * 300, "", "..", "\x00", "name", "1", "-f", "é", "a\nb", "run", "values"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 2**70), st.floats(), WORDS, st.text(max_size=8))
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.one_of(WORDS, st.text(max_size=6)), inner, max_size=4), max_leaves=8)


def fuzz(what):
    """Run the same ``CASES`` cases every time, and count them."""
    def decorate(test):
        inner = test.hypothesis.inner_test

        @wraps(inner)
        def counted(*args, **kwargs):
            RAN[what] += 1
            inner(*args, **kwargs)

        test.hypothesis.inner_test, test.cases = counted, what
        return settings(max_examples=CASES[what], deadline=None, derandomize=True, database=None,
                        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])(test)

    return decorate


@pytest.fixture(autouse=True)
def _every_case_is_run(request):
    yield
    what = getattr(request.function, "cases", None)
    assert what is None or RAN[what] >= CASES[what]


@contextmanager
def clear():
    """Check that a call succeeds or raises one of our errors with a message."""
    try:
        yield
    except CLEAR as error:
        assert len(str(error)) > 10, f"no clear error: {error!r}"


def test_there_are_at_least_two_thousand_cases():
    assert sum(CASES.values()) >= 2000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("root")).notebooks.parent


@pytest.fixture
def tree(root):
    return rows.Tree.at(root)


@fuzz("runs")
@given(text=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode),
                      JSON.map(lambda value: yaml.safe_dump(value).encode()),
                      st.sampled_from([b"a: &a [*a]", b"? [1]", b"a: 2001-13-45", b"!!python/object:os.system x",
                                       b"[" * 2000, b"- " * 3000, b"a: {notebook: tiny, parameters: {count: 0x}}"])))
def test_any_text_as_runs_yml(tree, text):
    (tree.notebooks / "runs.yml").write_bytes(text)
    with clear():
        rows.rows(tree)


ENTRIES = st.fixed_dictionaries({}, optional={
    "notebook": st.one_of(WORDS, JSON), "parameters": st.one_of(st.dictionaries(WORDS, LEAVES, max_size=3), JSON),
    "reading": LEAVES, "resources": st.one_of(st.dictionaries(WORDS, LEAVES, max_size=2), JSON), "memory_gb": LEAVES,
    "more": LEAVES})


@fuzz("entries")
@given(table=st.dictionaries(st.one_of(WORDS, LEAVES.filter(lambda value: not isinstance(value, float))), ENTRIES,
                             max_size=3))
def test_any_entries_in_runs_yml(tree, table):
    (tree.notebooks / "runs.yml").write_text(yaml.safe_dump(table))
    with clear():
        for row in rows.rows(tree).values():
            folder = rows.source(row, tree).resolve().parent
            assert folder == tree.notebooks.resolve() and tree.page(row).resolve().parent == tree.pages.resolve()


@fuzz("parameters")
@given(parameters=st.dictionaries(st.sampled_from(["fraction", "count", "name", "flag", "other"]), JSON, max_size=4),
       name=WORDS)
def test_any_parameters_of_a_row_and_on_the_command_line(tree, parameters, name):
    with clear():
        row = rows.checked(Row("small", "tiny", parameters), tree)
        staleness.fingerprint(row, tree)
        input_digests.digests_of(row, tree)
    with clear():
        run._override(f"{name}={parameters}")
    for default in (0.5, 3, "text", True, None):
        run._typed(f"{name} {parameters}", default)


@fuzz("texts")
@given(row=JSON, raw=st.binary(max_size=30), kind=st.sampled_from(["jsonl", "json", "txt"]),
       name=st.one_of(WORDS, st.text()))
def test_any_file_of_texts_and_any_name_of_one(tmp_path, row, raw, kind, name):
    file = tmp_path / f"mine.{kind}"
    for content in (json.dumps(row).encode(), raw, json.dumps(row).encode() + b"\n" + raw):
        file.write_bytes(content)
        for read in (data.texts, data.pairs):
            with clear():
                assert read(str(file))
    with clear():
        sources.parse(name)


RECORD = {"run": "small", "notebook": "tiny", "parameters": {"count": 3}, "values": {"twice": 1.5}, "rows": [],
          "items": {}, "made_with": {"commit": "x", "minutes": 1.0}}


def reads(folder, contents):
    (folder / "small.json").write_bytes(contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_RESULTS", str(folder))
        with clear():
            assert records.read("small")["run"] == "small"
        with clear():
            records.to_dataframe("tiny")
    records.contents(folder / "small.json")


@fuzz("records")
@given(contents=st.one_of(st.binary(max_size=80), JSON.map(lambda value: json.dumps(value).encode()),
                          st.dictionaries(st.sampled_from([*RECORD, "checksum"]), JSON, max_size=4).map(
                              lambda part: json.dumps({**RECORD, **part}).encode()),
                          st.sampled_from([b"[" * 5000, b"1" * 6000, b'{"a":' * 3000, b"NaN"])))
def test_any_contents_of_a_record(tmp_path, contents):
    reads(tmp_path, contents)


@fuzz("edited")
@given(at=st.integers(0, 10**4), byte=st.integers(0, 255))
def test_a_record_with_any_byte_changed_is_refused_or_means_the_same(tmp_path, at, byte):
    whole = json.dumps({**RECORD, "checksum": records.checksum(RECORD)}).encode()
    at %= len(whole)
    reads(tmp_path, whole[:at] + bytes([byte]) + whole[at + 1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_RESULTS", str(tmp_path))
        try:
            found = records.read("small")
        except ValueError:
            return
    if b"checksum" in (tmp_path / "small.json").read_bytes():
        assert found == RECORD


@pytest.fixture(scope="module")
def model():
    return build(families.tiny("llama", width=48, vocabulary=128))


INTEGERS = st.integers(-2, 30)
INDICES = st.one_of(st.lists(st.lists(INTEGERS, max_size=3).map(tuple), max_size=3).filter(
    lambda rows_: len({len(row) for row in rows_}) < 2), st.lists(INTEGERS, max_size=3))


@fuzz("plans")
@given(kind=st.one_of(st.sampled_from(GROUPED), WORDS), heads=INDICES, neurons=INDICES,
       dtype=st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool]), names=st.lists(WORDS, max_size=2))
def test_any_plan(model, kind, heads, neurons, dtype, names):
    with clear():
        plan = Plan(kind, torch.tensor(heads, dtype=dtype), torch.tensor(neurons, dtype=dtype), families.sizes(model))
        assert 0 <= plan.removed_fraction < 1 and str(plan)
    with clear():
        BlockPlan.of(model, names)


@fuzz("choices")
@given(fraction=st.one_of(st.floats(), st.floats(0, 1), st.integers(-1, 2)),
       scope=st.sampled_from([*selection.SCOPES, "x"]),
       rule=st.sampled_from([*selection.RULES, ""]),
       kind=st.sampled_from([*GROUPED, "none"]),
       heads=st.one_of(st.none(), st.integers(-3, 9)), seed=st.integers(0, 9))
def test_any_wish_for_a_plan(model, random_importance, fraction, scope, rule, kind, heads, seed):
    with clear():
        plan = selection.choose(random_importance(model), model, removed_fraction=fraction, scope=scope, rule=rule,
                            grouped_query=kind, heads_removed=heads, seed=seed)
        one = 2 * families.sizes(model).neuron_parameters / families.sizes(model).parameters
        assert scope == "heads" or abs(plan.removed_fraction - fraction) <= one  # heads are removed in whole units


@fuzz("scores")
@given(contents=st.binary(max_size=60), at=st.integers(0, 10**4), byte=st.integers(0, 255))
def test_any_file_of_scores(model, random_importance, tmp_path, contents, at, byte):
    path = tmp_path / "scores.safetensors"
    random_importance(model).save(path)
    whole = path.read_bytes()
    at %= len(whole)
    for damaged in (contents, whole[:at], whole[:at] + bytes([byte]) + whole[at + 1:]):
        path.write_bytes(damaged)
        with clear():
            Importance.load(path)


FIELDS = st.dictionaries(st.sampled_from(["network", "arguments", "mean", "std", "kept_blocks", "format_version", "x"]),
                         st.one_of(JSON, st.dictionaries(st.sampled_from(["depth", "classes", "shortcut", "channels"]),
                                                         st.one_of(st.integers(-3, 80), WORDS, LEAVES.filter(
                                                             lambda value: not isinstance(value, int))))), max_size=3)


@fuzz("networks")
@given(changed=FIELDS, text=st.one_of(st.none(), st.binary(max_size=30)))
def test_any_config_of_an_image_network(tmp_path, changed, text):
    folder = tmp_path / "net"
    if not folder.exists():
        folder.mkdir()
        image_networks.write(image_network("cifar_resnet", depth=8), folder)
        shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    config = {**json.loads((tmp_path / "config.json").read_text()), **changed}
    (folder / "config.json").write_bytes(json.dumps(config).encode() if text is None else text)
    with clear():
        if image_networks.is_image_network(folder):
            image_networks.read(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    build(families.tiny("llama", width=48, vocabulary=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


@fuzz("configs")
@given(data=st.data())
def test_any_config_of_a_checkpoint(checkpoint, data):
    folder, config = checkpoint
    numbers = st.one_of(st.integers(-3, 200), JSON.filter(lambda value: not isinstance(value, int)))
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(config)), numbers, min_size=1, max_size=2))
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with clear():
        loading.load_model(str(folder))


# --- what must not be run ---------------------------------------------------------------------------------------------


def test_a_model_that_brings_code_is_refused_unless_it_is_asked_for_by_name(checkpoint, tmp_path):
    folder, config = checkpoint
    brings = shutil.copytree(folder, tmp_path / "brings")
    mark = tmp_path / "ran"
    (brings / "code.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig\n"
                                    "class Config(LlamaConfig):\n    model_type = 'brings'\n")
    (brings / "config.json").write_text(json.dumps(
        {**config, "model_type": "brings", "auto_map": {"AutoConfig": "code.Config",
                                                        "AutoModelForCausalLM": "code.Model"}}))
    with pytest.raises(ValueError, match="does not load"):
        loading.load_model(str(brings))
    assert not mark.exists()
    with pytest.raises(ValueError, match="does not load"):  # it has no class Model
        loading.load_model(str(brings), trust_remote_code=True)
    assert mark.exists()


def test_notebooks_of_others_are_read_and_not_executed_by_anything_but_run(tmp_path, capsys):
    tree = make_tree(tmp_path / "root")
    mark = tmp_path / "ran"
    runs = f"open({str(mark)!r}, 'w')"
    notebook(tree.notebooks / "tiny.ipynb", "# Not ours", f"count = 3  # how many {{}}\nname = {runs}", runs)
    (tree.notebooks / "runs.yml").write_text("small: {notebook: tiny}")
    for command in (["status"], ["run", "small", "-p", "count=4"]):
        with pytest.raises(SystemExit, match="tiny.ipynb: its parameters cannot be read"):
            main.main([*command, "--root", str(tree.notebooks.parent)])
    assert not mark.exists()
    config = yaml.safe_load((rows.Path(execution.__file__).parents[2] / "book" / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"  # nor by the builder of the book


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_a_notebook_outside_of_the_tree_is_refused(tmp_path, name):
    tree = make_tree(tmp_path / "root")
    shutil.copyfile(tree.notebooks / "tiny.ipynb", tmp_path / "outside.ipynb")
    with pytest.raises(SystemExit, match="no notebook"):
        rows.source(Row("small", name, {}), tree)
    (tree.notebooks / "link.ipynb").symlink_to(tmp_path / "outside.ipynb")
    with pytest.raises(SystemExit, match="no notebook 'link'"):
        rows.source(Row("small", "link", {}), tree)


def test_a_record_that_names_another_run_or_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_RESULTS", str(tmp_path))
    (tmp_path / "small.json").write_text(json.dumps({**RECORD, "run": "../../etc/small"}))
    with pytest.raises(ValueError, match="but of '../../etc/small'"):
        records.read("small")

