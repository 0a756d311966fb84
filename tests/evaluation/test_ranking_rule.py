"""The rule of one criterion of removal against others: seeds are the units, small and noisy differences say nothing."""

import math

import numpy as np
import pytest
from scipy import stats

from pruning_lib.evaluation.ranking_rule import Comparison, compare, judge, low_drop
from pruning_lib.evaluation.score_rule import verdict

GOOD, BAD = (0.900, 0.902, 0.901), (0.880, 0.882, 0.879)


def comparison(**changed):
    return Comparison(**{**dict(difference=0.02, low=0.015, high=0.025, p_value=0.001, floor=0.004), **changed})


def test_a_comparison_is_welchs_test_over_seeds():
    found = compare(GOOD, BAD[:2])
    v = np.var(GOOD, ddof=1) / 3, np.var(BAD[:2], ddof=1) / 2
    freedom = sum(v) ** 2 / (v[0] ** 2 / 2 + v[1] ** 2 / 1)  # Welch and Satterthwaite
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(v))
    d = np.mean(GOOD) - np.mean(BAD[:2])
    assert (found.difference, found.low, found.high) == pytest.approx((d, d - half, d + half))
    assert found.p_value == pytest.approx(2 * stats.t.sf(d / math.sqrt(sum(v)), freedom))
    assert found.floor == pytest.approx(math.sqrt(2 * max(np.var(GOOD, ddof=1), np.var(BAD[:2], ddof=1))))


def test_better_turns_into_worse_when_the_two_change_places():
    assert judge([compare(GOOD, BAD)]) == ["better"] and judge([compare(BAD, GOOD)]) == ["worse"]
    assert judge([compare(GOOD, GOOD)]) == ["no difference that matters"]
    assert verdict(["better", "the same path", "not told apart"]) == "reproduced"


@pytest.mark.parametrize("changed", [{"difference": 0.009}, {"p_value": 0.06}, {"floor": 0.03}])
def test_each_of_the_three_conditions_is_needed(changed):
    assert judge([comparison()]) == ["better"]
    assert judge([comparison(**changed)]) == ["not told apart"]


def test_comparisons_of_one_claim_are_corrected_and_one_path_is_none():
    assert judge([comparison(p_value=0.02)]) == ["better"]
    assert judge([comparison(p_value=0.02)] * 3) == ["not told apart"] * 3
    once = compare(GOOD, BAD, paths=["1.1 2.1"] * 6)
    assert judge([comparison(p_value=0.02), once, once]) == ["better", "the same path", "the same path"]
    assert judge([compare(GOOD, BAD, paths=["1.1 2.1"] * 5 + ["2.1 1.1"])]) == ["better"]


def test_runs_without_any_spread_are_compared_by_their_difference():
    assert judge([compare([0.9, 0.9], [0.8, 0.8])]) == ["better"]
    assert judge([compare([0.9, 0.9], [0.9, 0.9])]) == ["no difference that matters"]


def test_one_seed_is_not_judged():
    with pytest.raises(ValueError, match="1 seeds against 3; give at least two"):
        compare(GOOD[:1], BAD)


def test_a_low_drop_is_at_most_one_and_a_half_points():
    assert low_drop([0.90, 0.91], [0.915, 0.92]) == "reproduced"
    assert low_drop([0.90, 0.90], [0.916, 0.916]) == "contradicted"
    assert low_drop([], [0.9]) == "not run"
