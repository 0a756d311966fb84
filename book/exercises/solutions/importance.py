"""Solution of exercise 1."""

import torch


def contribution(x, w_out, width):
    """Return what each head adds to the residual stream, (H, T, C)."""
    return torch.stack([x_h @ w_h.T for x_h, w_h in zip(x.split(width, 1), w_out.split(width, 1), strict=True)])


def head_importance(prompts, w_out, width):
    """Return the importance of every head, (H,)."""
    return torch.stack([contribution(x, w_out, width).abs().sum(2).mean(1) for x in prompts]).mean(0)
