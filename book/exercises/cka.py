"""Exercise 5: CKA.  Difficulty: 1 of 3.  Time: 20 minutes.

Read first: *Eight distances* in the chapter *Consensus: blocks*.
"""

import torch


def cka_distance(x, y):
    """Return 1 - linear CKA of two representations of the same images.

    Parameters
    ----------
    x, y : (N, P) and (N, Q), a row per image; the columns are not centred yet

    Returns
    -------
    float, 0 to 1
    """
    raise NotImplementedError
