"""Exercise 10: perplexity.  Difficulty: 2 of 3.  Time: 20 minutes.

Read first: the entry *perplexity* of the glossary.
"""

import torch


def perplexity(logits, tokens):
    """Return the perplexity of one text.

    The logits at place t predict the token at place t + 1.  The first token is predicted by nothing and does not count.

    Parameters
    ----------
    logits : (T, vocabulary)
    tokens : (T,) integers

    Returns
    -------
    float, the exponential of the mean negative log-probability of the T - 1 predicted tokens
    """
    raise NotImplementedError
