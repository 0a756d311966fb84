"""Exercise 1: the importance of heads.  Difficulty: 1 of 3.  Time: 20 minutes.

Read first: the chapter *AMP: heads and neurons*, up to *By hand*.
"""

import torch


def contribution(x, w_out, width):
    """Return what each head adds to the residual stream.

    Parameters
    ----------
    x : (T, H * width) the heads of one prompt side by side, as they enter the output projection
    w_out : (C, H * width) weight of the output projection; ``width`` columns belong to each head
    width : width of a head

    Returns
    -------
    (H, T, C) the contribution of each head to each token
    """
    raise NotImplementedError


def head_importance(prompts, w_out, width):
    """Return the importance of every head: the mean over tokens, then over prompts, of the L1 norm it adds.

    Parameters
    ----------
    prompts : list of (T, H * width), one entry per prompt; T differs between prompts
    w_out : (C, H * width)
    width : width of a head

    Returns
    -------
    (H,); every prompt has the same weight
    """
    raise NotImplementedError
