import math

from rank_sum import ranks, removal_order

SCORES = {"one": {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.9}, "two": {"a": 7, "b": 2, "c": 4, "d": 9},
          "three": {"a": 0.5, "b": 0.4, "c": 0.9, "d": 0.8}}  # the example of the chapter


def test_ranks_begin_at_zero():
    assert list(ranks([0.1, 0.3, 0.2, 0.9])) == [0, 2, 1, 3]


def test_equal_values_share_the_mean_of_their_ranks():
    assert list(ranks([5, 1, 5, 7])) == [1.5, 0, 1.5, 3]
    assert list(ranks([4, 4, 4])) == [1, 1, 1]


def test_the_order_of_the_example():
    assert removal_order(SCORES) == ["b", "a", "c", "d"]


def test_units_do_not_matter():
    other = {**SCORES, "one": {name: 1000 * math.exp(value) for name, value in SCORES["one"].items()}}
    assert removal_order(other) == removal_order(SCORES)


def test_a_copy_of_a_metric_has_a_second_vote():
    assert removal_order({**SCORES, "three": SCORES["one"]})[0] == "a"


def test_equal_sums_keep_the_order_of_the_table():
    assert removal_order({"one": {"z": 1, "y": 2}, "two": {"z": 2, "y": 1}}) == ["z", "y"]
