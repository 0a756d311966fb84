"""Exercise 2: from importances to a plan.  Difficulty: 2 of 3.  Time: 30 minutes.

Read first: the chapter *Grouped-query attention*, and *From importances to a plan* in *AMP: heads and neurons*.
"""

import torch


def choose_neurons(importance, count):
    """Return the ``count`` least important neurons of every block, in ascending order of their numbers.

    Parameters
    ----------
    importance : (L, M)
    count : number of neurons to remove from every block

    Returns
    -------
    (L, count) integers
    """
    raise NotImplementedError


def choose_groups(importance, groups, count):
    """Return the query heads of the ``count`` least important key/value groups of every block.

    The importance of a group is the mean importance of its query heads.  A group is a run of H / groups neighbouring
    query heads.

    Parameters
    ----------
    importance : (L, H)
    groups : number of key/value groups; it divides H
    count : number of groups to remove from every block, fewer than ``groups``

    Returns
    -------
    (L, count * H / groups) integers, in ascending order
    """
    raise NotImplementedError


def neurons_for(fraction, parameters, blocks, width, heads_parameters=0):
    """Return the number of neurons to remove per block so that ``fraction`` of all parameters is removed.

    Parameters
    ----------
    fraction : of all parameters
    parameters : number of parameters of the model
    blocks : number of blocks
    width : width C of the residual stream; a neuron of a LLaMA MLP has C parameters in each of three matrices
    heads_parameters : parameters of the heads that are removed from every block

    Returns
    -------
    int, rounded to the nearest neuron
    """
    raise NotImplementedError
