import math

from emissions import break_even_inputs, energy_joules, grams_co2e


def test_power_times_time():
    assert math.isclose(energy_joules(100, 60), 6000)


def test_only_the_share_that_was_used_counts():
    assert math.isclose(energy_joules(100, 60, share=0.25), 1500)


def test_idle_power_is_subtracted_once():
    assert math.isclose(energy_joules(100, 60, share=0.5, idle_w=10), 2400)


def test_a_kilowatt_hour_emits_the_intensity():
    assert math.isclose(grams_co2e(3.6e6, 0.4), 400)
    assert math.isclose(grams_co2e(3600, 0.05), 0.05)


def test_the_same_energy_emits_more_where_the_grid_does():
    assert math.isclose(grams_co2e(5000, 0.8) / grams_co2e(5000, 0.05), 16)


def test_pruning_pays_back_after_so_many_inputs():
    assert math.isclose(break_even_inputs(1000, 5, 3), 500)


def test_a_model_that_saves_nothing_never_pays_back():
    assert break_even_inputs(1000, 5, 5) == math.inf == break_even_inputs(1000, 5, 6)
