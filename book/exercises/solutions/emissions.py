"""Solution of exercise 8."""

import math


def energy_joules(power_w, seconds, share=1.0, idle_w=0.0):
    """Return the energy of a computation in joules."""
    return (power_w * share - idle_w) * seconds


def grams_co2e(joules, intensity):
    """Return the emissions in grams of CO2 equivalent."""
    return 1000 * intensity * joules / 3.6e6  # a kilowatt-hour is 3.6 million joules


def break_even_inputs(recovery_joules, dense_joules, pruned_joules):
    """Return the number of inputs after which pruning has paid for itself."""
    saved = dense_joules - pruned_joules
    return recovery_joules / saved if saved > 0 else math.inf
