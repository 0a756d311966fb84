"""A row may give a parameter the words that its comment states besides an int, and nothing else."""

import pytest
import yaml
from test_execution import notebook

from pruning_lib.cli import main
from pruning_lib.experiments import runs
from pruning_lib.experiments.runs import Tree

PARAMETERS = '''tokens = 512     # int or "all": how many tokens
heads = "same"   # int or "same" or "half": how many heads
rate = 0.5       # number, "all" is no word of it'''


@pytest.fixture
def checked(tmp_path):
    """Return a function that checks parameters against a notebook with the parameters above."""
    notebook(tmp_path / "notebooks" / "words.ipynb", "# Words", PARAMETERS.replace("how many tokens", "# how many"))
    (tmp_path / "notebooks" / "runs.yml").write_text(yaml.safe_dump({"words": {"notebook": "words"}}))
    return lambda **given: runs.checked(runs.Row("words", "words", given), Tree.at(tmp_path))


@pytest.mark.parametrize("given", [{"tokens": 3}, {"tokens": "all"}, {"heads": 3}, {"heads": "half"}, {"rate": 1}])
def test_an_int_and_the_words_of_a_comment_are_taken(checked, given):
    assert checked(**given).parameters == given


@pytest.mark.parametrize(("given", "wanted"), [
    ({"tokens": "every"}, "tokens takes an int or 'all', got 'every'"), ({"tokens": 1.5}, "an int or 'all', got 1.5"),
    ({"tokens": True}, "got True"), ({"heads": "all"}, "heads takes an int or 'same' or 'half', got 'all'"),
    ({"rate": "all"}, "rate takes float like 0.5, got 'all'")])
def test_anything_else_is_refused_with_what_is_allowed(checked, given, wanted):
    with pytest.raises(SystemExit, match=wanted):
        checked(**given)


@pytest.mark.parametrize(("text", "value"), [("tokens=7", 7), ("tokens=all", "all"), ("heads=3", 3),
                                             ("heads=same", "same")])
def test_the_command_line_gives_numbers_as_numbers_and_words_as_words(checked, tmp_path, monkeypatch, text, value):
    from pruning_lib.cli import run as command

    checked()
    seen = []
    monkeypatch.setattr(command.execution, "run", lambda row, tree, log: seen.append(row.parameters))
    assert main.main(["run", "words", "--root", str(tmp_path), "-p", text]) == 0
    assert seen == [{text.partition("=")[0]: value}]
