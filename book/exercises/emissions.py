"""Exercise 8: an estimate of emissions.  Difficulty: 1 of 3.  Time: 20 minutes.

Read first: the page *Energy and carbon*.
"""


def energy_joules(power_w, seconds, share=1.0, idle_w=0.0):
    """Return the energy of a computation in joules.

    Parameters
    ----------
    power_w : rated power of the processor in watts
    seconds : duration
    share : share of the processor's time that this computation used, 0 to 1
    idle_w : power in watts that the machine needs while it does nothing; it is not the computation's
    """
    raise NotImplementedError


def grams_co2e(joules, intensity):
    """Return the emissions in grams of CO2 equivalent.

    Parameters
    ----------
    joules : energy
    intensity : kilograms of CO2 equivalent per kilowatt-hour of the country's electricity
    """
    raise NotImplementedError


def break_even_inputs(recovery_joules, dense_joules, pruned_joules):
    """Return the number of inputs after which pruning has saved as much energy as it cost.

    Parameters
    ----------
    recovery_joules : energy spent on pruning and tuning, once
    dense_joules, pruned_joules : energy per input of the dense and of the pruned model

    Returns
    -------
    number of inputs; ``float("inf")`` if the pruned model saves nothing
    """
    raise NotImplementedError
