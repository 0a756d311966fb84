"""Digests follow references of a notebook into the package; text that cannot change a result does not count."""

import nbformat
import pytest

from pruning_lib.experiments import code_digests
from pruning_lib.experiments.code_digests import NOTEBOOK, PACKAGE, changed, digests
from pruning_lib.experiments.runs import Tree

FILES = {
    "tables.py": '''"""Tables."""
class Table(dict):
    def register(self):
        return lambda f: self.setdefault(f.__name__, f)
''',
    "measure.py": '''"""Measures."""
from net.tables import Table
from net import low
MEASURES = Table()
SCALE = 2.0

@MEASURES.register()
def mean(x):
    """Of x."""
    return SCALE * low.total(x)  # a remark

def all_of(x):
    return [measure(x) for measure in MEASURES.values()]

def unused(x):
    return low.other(x)
''',
    "low.py": '''def total(x):
    return sum(x)

def other(x):
    return max(x)

def __getattr__(name):
    raise AttributeError(name)
''',
    "front.py": "from net.low import total\n",
}
ALL = ["import os\nfrom net import measure", "%matplotlib inline\nmeasure.all_of([1])"]


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def followed(cells, package):
    """Return the names of the definitions used by cells, without the cells."""
    return [name for name in digests(cells, package) if name != NOTEBOOK]


def edit(package, name, old, new):
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new) + "\n" * len(new))  # another time, and another size


def test_definitions_are_followed_through_modules_tables_and_constants(package):
    assert list(followed(ALL, package)) == [
        "low.total", "measure.MEASURES", "measure.MEASURES[*]", "measure.MEASURES[mean]", "measure.SCALE",
        "measure.all_of", "tables.Table"]
    assert list(followed(["from net.front import total\ntotal([1])"], package)) == ["low.total"]
    assert list(followed(["from net import front\nfront.total([1])"], package)) == ["low.total"]
    assert list(followed(["import os"], package)) == []


def test_a_cell_that_is_no_python_leads_nowhere(package):
    assert list(followed(["what is this?", "from net import low\nlow.total([1])"], package)) == ["low.total"]


def test_a_module_may_name_its_neighbours_from_where_it_is(package):
    (package / "beside.py").write_text(
        "from . import low\nfrom .measure import SCALE\n\ndef f():\n    return low.total([SCALE])\n")
    assert list(followed(["from net import beside\nbeside.f()"], package)) == ["beside.f", "low.total", "measure.SCALE"]


def test_a_module_that_is_handed_on_counts_as_a_whole(package):
    assert {"low.total", "low.other"} <= set(digests(["from net import low\nprint(low)"], package))
    assert {"low.total", "low.other"} <= set(digests(
        ["import net.low\nimport net.front\nnet.low.total([1])"], package))


@pytest.mark.parametrize(("file", "old", "new"), [
    ("measure.py", '"""Of x."""', '"""Twice the sum of x."""'), ("measure.py", "  # a remark", ""),
    ("measure.py", "SCALE * low.total(x)", "(SCALE\n            * low.total(x))"),
    ("measure.py", "low.other(x)", "low.other(x) + 1"), ("low.py", "max(x)", "min(x)"),
    ("measure.py", "def mean(x):", "def mean(x: list) -> float:"),
    ("measure.py", "    return low.other(x)", "    raise ValueError(f'{x} is odd')")])
def test_words_layout_annotations_and_code_it_does_not_reach_change_nothing(package, file, old, new):
    before = digests(ALL, package)
    edit(package, file, old, new)
    assert changed(before, digests(ALL, package)) == []


@pytest.mark.parametrize(("file", "old", "new", "names"), [
    ("measure.py", "SCALE = 2.0", "SCALE = 3.0", ["measure.SCALE"]), ("low.py", "sum(x)", "sum(x) / 2", ["low.total"]),
    ("measure.py", "return SCALE *", "return -SCALE *", ["measure.MEASURES[mean]"]),
    ("tables.py", "f.__name__, f", "f.__name__, 0", ["tables.Table"]),
    ("low.py", "def total", "def sums", ["low.total"])])
def test_code_it_reaches_is_named_when_it_changes(package, file, old, new, names):
    before = digests(ALL, package)
    edit(package, file, old, new)
    assert changed(before, digests(ALL, package)) == names


def test_what_a_module_does_when_it_is_imported_counts_for_all_in_it(package):
    (package / "side.py").write_text("import random\nrandom.seed(1)\n\ndef draw():\n    return random.random()\n")
    cells = ["from net import side as here\nhere.draw()"]
    before = digests(cells, package)
    assert followed(cells, package) == ["side.draw", "side.random.seed(1)"]
    edit(package, "side.py", "seed(1)", "seed(2)")
    assert changed(before, digests(cells, package)) == ["side.random.seed(1)"]


@pytest.mark.parametrize("cell", [
    "import net.low as other\nother.total([1])", "from net import low as other\nother.total([1])",
    "from net.low import total as other\nother([1])"])
def test_other_names_for_what_is_imported_lead_to_the_same(package, cell):
    assert list(followed([cell], package)) == ["low.total"]


def test_what_is_filled_in_place_belongs_to_what_is_filled(package):
    (package / "fills.py").write_text("table = {}\ntable['a'] = 1\ntable.size = 1\n\ndef get():\n    return table\n")
    assert followed(["from net.fills import get\nget()"], package) == [
        "fills.get", "fills.table", "fills.table.size", "fills.table['a']", "fills.table[*]"]


NEW_ENTRY = ("def unused", "@MEASURES.register()\ndef further(x):\n    return 0\n\ndef unused")


def test_a_new_entry_counts_where_the_table_is_used_whole_and_nowhere_else(package):
    by_key = ["from net.measure import MEASURES\nMEASURES['mean']([1])"]
    (package / "user.py").write_text(
        "from net.measure import MEASURES\n\ndef one(x, name):\n    if name not in MEASURES:\n"
        "        raise ValueError(', '.join(MEASURES))\n    return MEASURES[name](x)\n\n"
        "def each(x):\n    return {name: f(x) for name, f in MEASURES.items()}\n")
    one, each = ["from net import user\nuser.one([1], 'mean')"], ["from net import user\nuser.each([1])"]
    before = {name: digests(cells, package) for name, cells in (("by key", by_key), ("one", one), ("each", each))}
    edit(package, "measure.py", *NEW_ENTRY)
    assert changed(before["by key"], digests(by_key, package)) == []
    assert changed(before["one"], digests(one, package)) == []
    assert changed(before["each"], digests(each, package)) == ["measure.MEASURES[*]"]


def test_folders_and_what_their_init_passes_on_are_followed(package):
    (package / "deep").mkdir()
    (package / "deep" / "__init__.py").write_text("from net.deep.core import f\n")
    (package / "deep" / "core.py").write_text("from .side import g\n\ndef f(x):\n    return g(x)\n")
    (package / "deep" / "side.py").write_text("from .. import low\n\ndef g(x):\n    return low.total(x)\n")
    (package / "__init__.py").write_text("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n"
                                         "    from net.deep.core import f\n")
    wanted = ["deep.core.f", "deep.side.g", "low.total"]
    for cell in ("from net import deep\ndeep.f([1])", "from net.deep import f\nf([1])", "import net as n\nn.f([1])",
                 "from net.deep import core\ncore.f([1])"):
        assert followed([cell], package) == wanted, cell


def test_a_map_of_names_gives_moved_and_renamed_code_the_digests_it_has_today(package, tmp_path):
    later = tmp_path / "later" / "net"
    (later / "steps").mkdir(parents=True)
    for name, text in FILES.items():
        place = later / "steps" / "gauge.py" if name == "measure.py" else later / name
        place.write_text(text.replace("all_of", "every"))
    names = {"measure": "steps.gauge", "measure.all_of": "steps.gauge.every"}
    now = digests(["from net.steps import gauge as g\ng.every([1])"], later)
    before = ["from net import measure\nmeasure.all_of([1])"]
    assert digests(before, package, names) == now != digests(before, package)
    edit(later, "steps/gauge.py", "SCALE = 2.0", "SCALE = 3.0")
    assert changed(digests(before, package, names), digests(["from net.steps import gauge\ngauge.every([1])"], later)
                   ) == ["steps.gauge.SCALE"]


def test_the_notebooks_of_the_book_reach_what_they_run_and_not_what_they_do_not():
    tree = Tree.at(PACKAGE.parent)
    cells = [cell.source for cell in nbformat.read(tree.notebooks / "amp_scores.ipynb", as_version=4).cells
             if cell.cell_type == "code"]
    found = set(code_digests.digests(cells))
    assert {"pruning.amp.importance", "pruning.amp.head_scores", "models.hooks.inputs_to",
            "models.language_families.FAMILIES",
            "models.loading.load_model"} <= found
    assert not [name for name in found if name.startswith(("pruning.consensus.", "pruning.similarity.", "cli."))]
