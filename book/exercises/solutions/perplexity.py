"""Solution of exercise 10."""

import torch


def perplexity(logits, tokens):
    """Return the perplexity of one text, a float."""
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).exp().item()
