"""Exercise 6: the sum of ranks.  Difficulty: 1 of 3.  Time: 20 minutes.

Read first: *The sum of ranks* in the chapter *Consensus: blocks*.
"""


def ranks(values):
    """Return the rank of each value: 0 for the smallest; equal values share the mean of their ranks.

    Parameters
    ----------
    values : list of numbers

    Returns
    -------
    list of numbers, in the order of ``values``
    """
    raise NotImplementedError


def removal_order(scores):
    """Return the names of the blocks by the sum of their ranks, the first to remove first.

    Parameters
    ----------
    scores : dict, metric -> dict, block -> distance; the blocks are the same for each metric

    Returns
    -------
    list of names; blocks with equal sums keep the order of the first metric
    """
    raise NotImplementedError
