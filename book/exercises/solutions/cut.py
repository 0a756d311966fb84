"""Solution of exercise 3."""

import torch


def kept(count, removed):
    """Return the numbers below ``count`` that are not in ``removed``."""
    return torch.tensor([n for n in range(count) if n not in set(removed)], dtype=torch.long)


def cut_neurons(gate, up, down, removed):
    """Return the three matrices without the removed neurons."""
    stays = kept(len(gate), removed)
    return gate[stays], up[stays], down[:, stays]


def cut_groups(q, k, v, o, removed, groups):
    """Return the four matrices without the removed groups."""
    stays = kept(groups, removed)
    C = q.shape[1]
    q, k, v = (part.view(groups, -1, C)[stays].flatten(0, 1) for part in (q, k, v))
    return q, k, v, o.view(len(o), groups, -1)[:, stays].flatten(1)
