"""Whatever is cached is computed once per settings, whole or not at all, by one process at a time."""

import json

import pytest
from two_processes import check_that_the_second_waits

from pruning_lib.experiments.computed_once import computed_once, json_once, place


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))


def never():
    raise AssertionError("computed again")


def test_the_order_of_the_settings_does_not_matter_and_their_values_do():
    assert json_once("kind", {"a": 1, "b": [2, "c"]}, lambda: {"x": 0.5}) == {"x": 0.5}
    assert json_once("kind", {"b": [2, "c"], "a": 1}, never) == {"x": 0.5}
    for other in ({"a": 1, "b": [2, "d"]}, {"a": 1.5, "b": [2, "c"]}, {"a": 1}):
        with pytest.raises(AssertionError, match="computed again"):
            json_once("kind", other, never)
    with pytest.raises(AssertionError, match="computed again"):
        json_once("other", {"a": 1, "b": [2, "c"]}, never)


def test_an_interruption_leaves_nothing_and_damage_is_named(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        json_once("kind", {"a": 1}, interrupted)
    assert not list((tmp_path / "kind").iterdir())
    json_once("kind", {"a": 1}, lambda: [1])
    path = place("kind", {"a": 1}, ".json")
    for content in ("{", "[]", "{}", "null"):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{path} cannot be read .*delete it"):
            json_once("kind", {"a": 1}, never)


def test_a_file_of_the_version_before_is_read():
    path = place("answered", {"a": 1}, ".json")
    path.parent.mkdir()
    path.write_text(json.dumps({"answers": ["3:a"], "settings": {"a": 1}}))
    assert json_once("answered", {"a": 1}, never) == ["3:a"]


def test_a_result_may_be_asked_for_while_it_is_computed():
    def outer(path):
        computed_once("kind", {"a": 1}, lambda p: p.write_text("inner"), lambda p: p.read_text())

    assert computed_once("kind", {"a": 1}, outer, lambda p: p.read_text()) == "inner"


@pytest.mark.parametrize("first_dies", [False, True])
def test_of_two_processes_that_want_it_the_second_waits_and_makes_it_only_if_the_first_dies(tmp_path, first_dies):
    check_that_the_second_waits(lambda by: json_once("kind", {"a": 1}, by), tmp_path, first_dies=first_dies)
