"""Exercise 3: cutting a block.  Difficulty: 2 of 3.  Time: 40 minutes.

Read first: the page *Pruning by hand*, and the chapter *Grouped-query attention*.
"""

import torch


def cut_neurons(gate, up, down, removed):
    """Return the three matrices of a gated MLP without the ``removed`` neurons.

    Parameters
    ----------
    gate, up : (M, C) a row per neuron
    down : (C, M) a column per neuron
    removed : list of neuron numbers

    Returns
    -------
    gate, up, down of M - len(removed) neurons; the order of the others is unchanged
    """
    raise NotImplementedError


def cut_groups(q, k, v, o, removed, groups):
    """Return the four matrices of grouped-query attention without the ``removed`` key/value groups.

    Parameters
    ----------
    q : (H * D, C) D rows per query head
    k, v : (groups * D, C) D rows per key/value head
    o : (C, H * D) D columns per query head
    removed : list of group numbers
    groups : number of key/value groups; group g serves the query heads g * H / groups to (g + 1) * H / groups - 1

    Returns
    -------
    q, k, v, o
    """
    raise NotImplementedError
