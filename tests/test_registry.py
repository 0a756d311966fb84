"""Tables look names up; errors list the known names."""

import pytest

from pruning_lib._registry import Table


def test_an_unknown_name_is_answered_with_what_it_is_and_every_known_name():
    table = Table("metric")
    table["cka"], table["angle"] = 1, 2
    with pytest.raises(ValueError, match=r"unknown metric 'CKA'; known: angle, cka"):
        table["CKA"]


def test_a_function_is_entered_under_its_own_name_with_its_facts_and_stays_a_plain_function():
    table = Table("metric")

    @table.register(symmetric=True)
    def angle(x):
        return x + 1

    @table.register("other_name")
    def cosine(x):
        return x

    assert table["angle"] is angle and angle(1) == 2
    assert list(table) == ["angle", "other_name"]
    assert table.facts == {"angle": {"symmetric": True}, "other_name": {}}


def test_a_name_cannot_be_taken_twice():
    table = Table("attack")
    first = table.register("fgsm")(lambda: 1)
    with pytest.raises(ValueError, match="attack 'fgsm' is registered twice"):
        table.register("fgsm")(lambda: 2)
    assert table["fgsm"] is first


def test_asking_whether_a_name_is_known_does_not_raise():
    table = Table("metric")
    assert "cka" not in table and table.get("cka") is None
