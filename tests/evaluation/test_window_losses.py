"""Comparisons window by window: exact ratios, intervals that cover, and refusals."""

import math

import numpy as np
import pytest

from pruning_lib.evaluation import quality
from pruning_lib.evaluation.window_losses import WindowLosses, paired

TEXTS = ["It is a truth universally acknowledged,", "that a single man", "in possession of a good fortune."]


def windows(losses, tokens=10):
    return WindowLosses(np.array(losses, float), np.full(len(losses), tokens)).pack()


def test_the_windows_of_a_record_give_its_perplexity_and_its_tokens(tiny, tokenizer):
    found = quality.perplexity(tiny("llama"), tokenizer, TEXTS, window=16, stride=16, progress=False)
    kept = WindowLosses.unpack(found["windows"])
    assert math.exp(kept.mean) == pytest.approx(found["perplexity"], rel=1e-5)
    assert kept.tokens.sum() == found["tokens"] and len(kept.tokens) == 6
    assert WindowLosses.unpack(kept.pack()).pack() == kept.pack()


def test_the_ratio_is_that_of_the_perplexities_and_turns_round_with_the_models():
    a, b = windows([20, 31, 25]), windows([22, 30, 28])
    there, back = paired(a, b), paired(b, a)
    assert there["perplexity_ratio"] == pytest.approx(math.exp((76 - 80) / 30))
    assert there["perplexity_ratio"] * back["perplexity_ratio"] == pytest.approx(1)
    assert there["ratio_low"] * back["ratio_high"] == pytest.approx(1)
    assert (there["windows"], there["windows_won"], back["windows_won"]) == (3, 2, 1)


def test_paired_compares_windows_as_well_as_items_but_not_one_with_the_other():
    a, b = windows([20, 31, 25]), windows([22, 30, 28])
    assert quality.paired(a, b) == paired(a, b)
    with pytest.raises(ValueError, match="same kind"):
        quality.paired(a, {"piqa": quality.pack(np.ones(4, bool))})


def test_a_difference_that_every_window_shows_is_certain_however_hard_windows_differ():
    hard = np.array([10.0, 400.0, 30.0, 90.0])
    found = paired(windows(hard + 1), windows(hard))
    assert found["ratio_low"] == pytest.approx(found["ratio_high"]) == pytest.approx(math.exp(0.1), rel=1e-4)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    """Percentile intervals of few windows are a little short: 95 % nominal are 90 to 97 % for 16 windows."""
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        hard = rng.normal(300, 80, 16)
        found = paired(windows(hard + rng.normal(2, 5, 16), 100), windows(hard, 100), resamples=1000, seed=trial)
        covered += found["ratio_low"] <= math.exp(0.02) <= found["ratio_high"]
    assert 0.88 <= covered / 300 <= 0.98


@pytest.mark.parametrize(("first", "second", "message"), [
    (windows([1, 2]), windows([1, 2, 3]), "not measured on the same windows"),
    (windows([1, 2]), windows([1, 2], 9), "not measured on the same windows"),
    (windows([1]), windows([1]), "single window"), ("a:b", windows([1, 2]), "no window losses"),
    ("", windows([1, 2]), "at least one window")])
def test_what_cannot_be_compared_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired(first, second)
