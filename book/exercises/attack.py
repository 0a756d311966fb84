"""Exercise 7: an attack.  Difficulty: 2 of 3.  Time: 40 minutes.

Read first: the chapter *Robustness*.
"""

import torch


def fgsm(network, images, labels, epsilon):
    """Return images after one step of length ``epsilon`` along the sign of the gradient of the loss.

    Parameters
    ----------
    network : images (N, ...) -> logits (N, classes)
    images : (N, ...) with values in [0, 1]
    labels : (N,) classes
    epsilon : budget in the maximum norm

    Returns
    -------
    (N, ...) with values in [0, 1]
    """
    raise NotImplementedError


def pgd(network, images, labels, epsilon, steps):
    """Return images after ``steps`` steps of length 2.5 * epsilon / steps, each followed by a projection.

    The projection brings every value back to within ``epsilon`` of the image, and to [0, 1].  The start is the image.

    Parameters
    ----------
    network, images, labels, epsilon : as in ``fgsm``
    steps : number of steps

    Returns
    -------
    (N, ...) with values in [0, 1]
    """
    raise NotImplementedError
