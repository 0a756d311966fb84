"""Solution of exercise 2."""

import torch


def choose_neurons(importance, count):
    """Return the least important neurons of every block, (L, count)."""
    return importance.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values


def choose_groups(importance, groups, count):
    """Return the query heads of the least important groups of every block."""
    L, H = importance.shape
    size = H // groups
    chosen = choose_neurons(importance.view(L, groups, size).mean(2), count)  # (L, count)
    return (chosen[:, :, None] * size + torch.arange(size)).flatten(1)


def neurons_for(fraction, parameters, blocks, width, heads_parameters=0):
    """Return the number of neurons to remove per block."""
    return round((fraction * parameters / blocks - heads_parameters) / (3 * width))
