"""The rule of the verdict is symmetric, corrects for many comparisons, and ignores what is too small to matter."""

import numpy as np
import pytest

from pruning_lib.evaluation import robustness_rule as rule


def test_holms_adjustment_rejects_what_the_step_down_procedure_rejects():
    generator = np.random.default_rng(0)
    for p in (generator.random(7) ** 3 for _ in range(50)):
        adjusted = rule.holm(p)
        for level in (0.01, 0.05, 0.2):
            rejected, order = np.zeros(7, bool), np.argsort(p)
            for step, i in enumerate(order):
                if p[i] > level / (7 - step):
                    break
                rejected[i] = True
            np.testing.assert_array_equal(adjusted <= level, rejected)


@pytest.mark.parametrize("differences, p_values, expected", [
    ([], [], "not run"),
    ([0.05, 0.02], [1e-6, 1e-6], "reproduced"),
    ([0.03, 0.02], [1e-6, 1e-6], "partly"),
    ([0.05, -0.02], [1e-6, 1e-6], "contradicted"),  # gains do not outnumber losses
    ([0.05, 0.02, -0.02], [1e-6] * 3, "reproduced"),
    ([0.05, 0.05], [0.03, 0.04], "no difference"),  # neither stands after the correction
    ([0.009, -0.009], [1e-9, 1e-9], "no difference"),  # too small to matter, however sure
    ([-0.05], [1e-6], "contradicted")])
def test_the_verdict_follows_the_sure_changes(differences, p_values, expected):
    assert rule.verdict(differences, p_values) == expected


def test_the_rule_is_the_same_in_both_directions():
    d, p = np.array([0.05, -0.03, 0.002, 0.02]), [1e-5, 1e-4, 1e-9, 0.2]
    np.testing.assert_array_equal(rule.sure_changes(-d, p), -rule.sure_changes(d, p))


def test_the_summary_counts_what_the_verdict_rests_on():
    found = rule.summary([0.05, -0.02, 0.001], [1e-6, 1e-6, 1e-9])
    assert (found["sure_gains"], found["sure_losses"], found["verdict"]) == (1, 1, "contradicted")
    assert found["mean_fraction"] == pytest.approx(0.031 / 3)
    assert rule.summary([], []) == {"comparisons": 0, "sure_gains": 0, "sure_losses": 0, "verdict": "not run"}


def test_a_difference_of_means_is_paired():
    generator = np.random.default_rng(2)
    image = generator.random(500)  # images differ much, networks little
    found = rule.mean_difference(image + 0.02 + 0.01 * generator.normal(size=500), image)
    assert found["difference_low"] < 0.02 < found["difference_high"] < 0.025 and found["p_value"] < 1e-9
    assert rule.mean_difference(image, image)["p_value"] == 1.0


def test_kept_shares_compare_at_equal_clean_accuracy():
    generator = np.random.default_rng(1)
    clean, worse = generator.random(4000) < 0.9, generator.random(4000) < 0.6
    half = generator.random(4000) < 0.5
    share, low, high = rule.kept_share_difference(clean & half, clean, worse & half, worse)
    assert low < 0 < high and abs(share) < 0.03  # one keeps 45 % and the other 30 %, both half of what they had
    fewer = worse & half & (generator.random(4000) < 0.8)
    share, low, high = rule.kept_share_difference(clean & half, clean, fewer, worse)
    assert share == pytest.approx(0.1, abs=0.03) and low > 0.05 and high < 0.15


def test_a_gradient_is_masked_if_stronger_attacks_take_more_from_the_pruned_network():
    assert rule.masked_gradient(pruned=(0.60, 0.52), whole=(0.50, 0.45))
    assert not rule.masked_gradient(pruned=(0.60, 0.54), whole=(0.50, 0.45))  # one point is not more than one point
    assert not rule.masked_gradient(pruned=(0.60, 0.60), whole=(0.50, 0.30))
