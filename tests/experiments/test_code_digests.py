"""What a notebook leads to in the package is followed by name; what the code does not do does not count."""

import nbformat
import pytest

from pruning_lib.experiments import code_digests
from pruning_lib.experiments.code_digests import PACKAGE, changed, digests
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


def edit(package, name, old, new):
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new) + "\n" * len(new))  # another time, and another size


def test_definitions_are_followed_through_modules_tables_and_constants(package):
    assert list(digests(ALL, package)) == ["low.total", "measure.MEASURES", "measure.MEASURES[mean]", "measure.SCALE",
                                           "measure.all_of", "tables.Table"]
    assert list(digests(["from net.front import total\ntotal([1])"], package)) == ["low.total"]
    assert list(digests(["from net import front\nfront.total([1])"], package)) == ["low.total"]
    assert list(digests(["import os"], package)) == []


def test_a_cell_that_is_no_python_leads_nowhere(package):
    assert list(digests(["what is this?", "from net import low\nlow.total([1])"], package)) == ["low.total"]


def test_a_module_may_name_its_neighbours_from_where_it_is(package):
    (package / "beside.py").write_text(
        "from . import low\nfrom .measure import SCALE\n\ndef f():\n    return low.total([SCALE])\n")
    assert list(digests(["from net import beside\nbeside.f()"], package)) == ["beside.f", "low.total", "measure.SCALE"]


def test_a_module_that_is_handed_on_counts_as_a_whole(package):
    assert {"low.total", "low.other"} <= set(digests(["from net import low\nprint(low)"], package))
    assert {"low.total", "low.other"} <= set(digests(
        ["import net.low\nimport net.front\nnet.low.total([1])"], package))


@pytest.mark.parametrize(("file", "old", "new"), [
    ("measure.py", '"""Of x."""', '"""Twice the sum of x."""'), ("measure.py", "  # a remark", ""),
    ("measure.py", "SCALE * low.total(x)", "(SCALE\n            * low.total(x))"),
    ("measure.py", "low.other(x)", "low.other(x) + 1"), ("low.py", "max(x)", "min(x)"),
    ("measure.py", "def unused", "@MEASURES.register()\ndef further(x):\n    return 0\n\ndef unused")])
def test_words_layout_code_it_does_not_reach_and_new_entries_change_nothing(package, file, old, new):
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
    assert list(before) == ["side.draw", "side.random.seed(1)"]
    edit(package, "side.py", "seed(1)", "seed(2)")
    assert changed(before, digests(cells, package)) == ["side.random.seed(1)"]


@pytest.mark.parametrize("cell", [
    "import net.low as other\nother.total([1])", "from net import low as other\nother.total([1])",
    "from net.low import total as other\nother([1])"])
def test_other_names_for_what_is_imported_lead_to_the_same(package, cell):
    assert list(digests([cell], package)) == ["low.total"]


def test_what_is_filled_in_place_belongs_to_what_is_filled(package):
    (package / "fills.py").write_text("table = {}\ntable['a'] = 1\ntable.size = 1\n\ndef get():\n    return table\n")
    found = digests(["from net.fills import get\nget()"], package)
    assert list(found) == ["fills.get", "fills.table", "fills.table.size", "fills.table['a']"]


def test_the_notebooks_of_the_book_reach_what_they_run_and_not_what_they_do_not():
    tree = Tree.at(PACKAGE.parent)
    cells = [cell.source for cell in nbformat.read(tree.notebooks / "amp_scores.ipynb", as_version=4).cells
             if cell.cell_type == "code"]
    found = set(code_digests.digests(cells))
    assert {"amp.importance", "amp.head_scores", "activations.inputs_to", "families.FAMILIES", "models.load"} <= found
    assert not [name for name in found if name.startswith(("consensus.", "similarity.", "runner.", "cli."))]
