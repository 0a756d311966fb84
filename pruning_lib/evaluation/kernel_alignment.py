"""Find which blocks of an ancestor the blocks of a tuned network are, by the kernels of their convolutions.

Tuning moves kernels little: a block stays recognisable, and kernels of two different blocks are unrelated.  Over many
rounds of tuning the likeness wears off, so a chain of networks is matched link by link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning_lib.models import families


@dataclass(frozen=True)
class Alignment:
    """The origins of the blocks of a network.

    Attributes
    ----------
    origins : name in the ancestor of each block, in the order data passes them
    lowest_match : correlation of kernels of the worst matched block, -1 to 1
    highest_other : the highest correlation of any block with another than its match; far below ``lowest_match`` if
        the match is safe
    """

    origins: tuple[str, ...]
    lowest_match: float
    highest_other: float


def align(network: nn.Module, ancestor: nn.Module) -> Alignment:
    """Match every residual block of ``network`` to the block of ``ancestor`` with the most similar kernels.

    Raises
    ------
    ValueError
        when two blocks match the same one, or the order differs: the networks are not related.
    """
    places = [info.name for info in families.residual_blocks(ancestor)]
    old = [_kernels(ancestor.get_submodule(name)) for name in places]
    new = [_kernels(network.get_submodule(info.name)) for info in families.residual_blocks(network)]
    table = torch.tensor([[_correlation(a, b) for b in old] for a in new])  # (blocks, blocks of the ancestor)
    best = table.argmax(1).tolist()
    if best != sorted(set(best)):
        raise ValueError(f"blocks match {', '.join(places[i] for i in best)} of the ancestor; wanted different ones in "
                         f"order. These networks are not related, or too much tuning lies between them")
    matched = table.max(1).values.min().item()
    table[range(len(best)), best] = -1
    return Alignment(tuple(places[i] for i in best), matched, table.max().item())


def align_chain(networks: Sequence[nn.Module]) -> list[Alignment]:
    """Return for each network but the first where its blocks come from in the first one, matched link by link."""
    found: list[Alignment] = []
    names = [info.name for info in families.residual_blocks(networks[0])]
    first = dict(zip(names, names, strict=True))
    for before, now in zip(networks, networks[1:], strict=False):
        link = align(now, before)
        origins = tuple(first[name] for name in link.origins)
        found.append(Alignment(origins, link.lowest_match, link.highest_other))
        first = dict(zip((info.name for info in families.residual_blocks(now)), origins, strict=True))
    return found


def _kernels(block: nn.Module) -> list[Tensor]:
    return [m.weight.detach().flatten() for m in block.modules() if isinstance(m, nn.Conv2d)]


def _correlation(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the mean correlation of the kernels of two blocks; -1 for blocks of other shapes."""
    if [len(a) for a in first] != [len(b) for b in second]:
        return -1.0
    pairs = zip(first, second, strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in pairs]).mean())
