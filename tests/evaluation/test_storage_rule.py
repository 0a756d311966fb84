"""The rule of "prune or quantise?": rivals, judgements, the bound of speed, the Pareto front."""

import numpy as np
import pytest

from pruning_lib.evaluation import storage_rule
from pruning_lib.evaluation.window_losses import WindowLosses

RNG = np.random.default_rng(0)
HARD = RNG.normal(300, 60, 32)  # the windows differ much more than the files do


def file(name, removed, size, speed, log_perplexity, noise=0.2):
    losses = WindowLosses(HARD + 100 * log_perplexity + RNG.normal(0, noise, 32), np.full(32, 100))
    return {"name": name, "removed_fraction": removed, "file_bytes": size, "tokens_per_s": speed,
            "perplexity": float(np.exp(losses.mean)), "windows": losses.pack()}


FILES = [file("f16", 0, 200, 10, 0.00), file("q8", 0, 100, 20, 0.001), file("q4", 0, 60, 30, 0.10),
         file("pruned f16", 0.2, 160, 14, 0.30), file("pruned q8", 0.2, 80, 25, 0.05),
         file("pruned q4", 0.2, 50, 40, 0.40), file("light q8", 0.1, 100, 20, 0.001)]


def test_the_rival_is_the_best_whole_file_that_is_no_larger_or_no_slower():
    by_bytes = {c.pruned: c.rival for c in storage_rule.cases(FILES, at_equal="file_bytes")}
    assert by_bytes == {"pruned f16": "q8", "pruned q8": "q4", "pruned q4": "", "light q8": "q8"}
    by_speed = {c.pruned: c.rival for c in storage_rule.cases(FILES, at_equal="tokens_per_s")}
    assert by_speed == {"pruned f16": "q8", "pruned q8": "q4", "pruned q4": "", "light q8": "q8"}
    with pytest.raises(ValueError, match="at_equal='size'; allowed: file_bytes, tokens_per_s"):
        storage_rule.cases(FILES, at_equal="size")


def test_cases_are_judged_in_both_directions_alike():
    cases = storage_rule.cases(FILES, at_equal="file_bytes")
    words = dict(zip([c.pruned for c in cases], storage_rule.judge(cases), strict=True))
    assert words == {"pruned f16": "worse", "pruned q8": "better", "pruned q4": "out of reach",
                     "light q8": "no difference that matters"}
    assert cases[0].ratio == pytest.approx(np.exp(0.299), rel=2e-3) and cases[0].low < cases[0].ratio < cases[0].high


def test_noise_is_not_told_apart():
    noisy = [file("q8", 0, 100, 20, 0, noise=60), file("pruned", 0.2, 120, 20, 0.03, noise=60)]
    assert storage_rule.judge(storage_rule.cases(noisy, at_equal="file_bytes")) == ["not told apart"]


@pytest.mark.parametrize(("low", "high", "word"), [(1.1, 1.2, "reaches"), (1.08, 1.1, "reaches"),
                                                   (1.07, 1.1, "not told apart"), (0.9, 1.07, "misses")])
def test_a_gain_reaches_nine_tenths_of_its_bound_with_its_whole_interval(low, high, word):
    assert storage_rule.reached(low, high, bound=1.2) == word


def test_the_front_holds_what_nothing_beats():
    assert storage_rule.front([1, 2, 3, 3, 4], [5, 4, 4, 3, 3]).tolist() == [True, True, False, True, False]
    assert storage_rule.front([1, 1], [2, 2]).tolist() == [True, True]  # equals do not beat each other
