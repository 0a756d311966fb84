"""The rule of AMP against other scores: symmetric, corrected, blind to noise and to single windows."""

import math

import numpy as np
import pytest
from scipy import stats

from pruning_lib.evaluation import score_rule
from pruning_lib.evaluation.score_rule import Comparison, compare, holm, judge, verdict
from pruning_lib.evaluation.window_losses import WindowLosses

HARD = np.array([300.0, 350.0, 420.0, 380.0])  # losses of four windows of 100 tokens


def draws(*shifts, extra=(0, 0, 0, 0)):
    """One model per shift (nats per token), on windows that differ more than the models do."""
    return [WindowLosses(HARD + 100 * s + np.array(extra), np.full(4, 100)).pack() for s in shifts]


def comparison(**changed):
    return Comparison(**{**dict(ratio=0.9, low=0.88, high=0.92, p_value=0.001, floor=1.03, windows_low=0.85,
                                windows_high=0.95), **changed})


def test_a_comparison_is_the_paired_t_test_over_draws():
    first, second = (0.00, 0.03, 0.01, 0.05), (0.10, 0.12, 0.13, 0.14)
    found = compare(draws(*first), draws(*second))
    difference = np.subtract(first, second)
    low, high = stats.t.interval(0.95, 3, difference.mean(), stats.sem(difference))
    assert (found.ratio, found.low, found.high) == pytest.approx(
        (math.exp(difference.mean()), math.exp(low), math.exp(high)), rel=1e-6)
    assert found.p_value == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
    assert found.floor == pytest.approx(math.exp(math.sqrt(2 * np.var(first, ddof=1))), rel=1e-5)


def test_better_turns_into_worse_when_the_two_change_places():
    first, second = draws(0.0, 0.01, 0.02), draws(0.2, 0.215, 0.22)
    assert judge([compare(first, second)]) == ["better"] and judge([compare(second, first)]) == ["worse"]
    assert judge([compare(first, draws(*np.linspace(0.3, 0.4, 10)), same_draws=False)]) == ["better"]


def test_the_same_score_on_other_draws_is_not_told_apart():
    assert judge([compare(draws(0.0, 0.05, 0.1), draws(0.06, 0.11, -0.01))]) == ["not told apart"]
    assert judge([compare(draws(0.0, 0.05, 0.1), draws(0.001, 0.052, 0.1005))]) == ["no difference that matters"]


@pytest.mark.parametrize("changed", [
    {"ratio": 0.985, "low": 0.97, "high": 0.99, "floor": 1.001},  # too small to matter
    {"p_value": 0.06},  # too likely by chance
    {"floor": 1.2},  # less than two draws of one score differ
    {"windows_high": 1.01}])  # the work of a few windows
def test_each_of_the_four_conditions_is_needed(changed):
    assert judge([comparison()]) == ["better"]
    assert judge([comparison(**changed)]) == ["not told apart"]


def test_many_comparisons_are_corrected():
    assert judge([comparison(p_value=0.02)]) == ["better"]
    assert judge([comparison(p_value=0.02)] * 3) == ["not told apart"] * 3
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])  # by hand


@pytest.mark.parametrize(("judged", "expected"), [
    ([], "not run"), (["better", "not told apart"], "reproduced"), (["better", "better", "worse"], "partly"),
    (["worse", "not told apart"], "contradicted"), (["worse", "worse", "better"], "partly contradicted"),
    (["better", "worse"], "no difference"), (["no difference that matters"], "no difference")])
def test_verdicts_treat_both_directions_alike(judged, expected):
    assert verdict(judged) == expected


def test_draws_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="1 draws against 2"):
        compare(draws(0.0), draws(0.0, 0.1))
    with pytest.raises(ValueError, match="3 draws against 2"):
        compare(draws(0.0, 0.1, 0.2), draws(0.0, 0.1))
    assert score_rule.SMALLEST > 1


SMALL = [(0.1, 0.10, 0.12), (0.3, 0.50, 0.60)]


@pytest.mark.parametrize("large, expected", [
    ([(0.1, 0.05, 0.06), (0.3, 0.30, 0.40)], "less"),
    ([(0.2, 0.20, 0.25), (0.4, 0.60, 0.62)], "less"),             # compared between 0.2 and 0.3 only
    ([(0.2, 0.20, 0.31), (0.4, 0.90, 0.95)], "not told apart"),   # the small one's line has 0.30 at 0.2
    ([(0.1, 0.20, 0.22), (0.3, 0.70, 0.90)], "more"),
    ([(0.1, 0.05, 0.06), (0.3, 0.70, 0.90)], "not told apart"),   # the lines cross
    ([(0.35, 0.05, 0.06), (0.4, 0.05, 0.06)], "not told apart")])  # no share at which both were cut
def test_a_larger_model_loses_less_where_its_line_lies_below_with_all_draws(large, expected):
    assert score_rule.larger_loses(large, SMALL) == expected
    mirrored = {"less": "more", "more": "less"}.get(expected, expected)
    assert score_rule.larger_loses(SMALL, large) == mirrored
