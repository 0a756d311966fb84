"""The plan of a width-pruning method: the heads and neurons to remove.  Cutting is in ``surgery``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning_lib.models.families import Sizes

GROUPED = ("whole_groups", "equal_queries")


@dataclass(frozen=True)
class Plan:
    """Heads and neurons to remove: the same number in every block that has any, at places that may differ.

    The shape of ``heads`` makes unequal cuts of grouped-query attention impossible to write down:

    * ``whole_groups``: (La, k), numbers of key/value groups, each with all its queries;
    * ``equal_queries``: (La, G, k), for every group the k places, within the group, of the removed query heads.

    ``neurons`` is (Lm, m).  La and Lm are the numbers of blocks with heads and with neurons, L in most families.
    ``sizes`` are the sizes of the model the plan was made for.
    """

    grouped_query: str
    heads: Tensor
    neurons: Tensor
    sizes: Sizes

    def __post_init__(self) -> None:
        s = self.sizes
        if self.grouped_query not in GROUPED:
            raise ValueError(f"grouped_query={self.grouped_query!r}; allowed: {', '.join(GROUPED)}")
        La = len(s.head_blocks)
        lead, places = ((La,), s.groups) if self.grouped_query == "whole_groups" else (
            (La, s.groups), s.heads // s.groups)
        if s.heads or self.heads.numel():  # of a model without heads any empty tensor will do, and so for neurons
            check_indices("heads", self.heads, lead, places)
        if s.neurons or self.neurons.numel():
            check_indices("neurons", self.neurons, (len(s.neuron_blocks),), s.neurons)

    @property
    def removed_heads(self) -> Tensor:
        """Return the numbers (La, h) of the removed query heads."""
        per_group = self.sizes.heads // max(self.sizes.groups, 1)
        if self.grouped_query == "whole_groups":
            return (self.heads.unsqueeze(-1) * per_group + torch.arange(per_group)).flatten(1)
        return (torch.arange(self.sizes.groups)[:, None] * per_group + self.heads).flatten(1)

    @property
    def removed_groups(self) -> Tensor:
        """Return the numbers (La, g) of the removed key/value groups."""
        return self.heads if self.grouped_query == "whole_groups" else self.heads.new_empty(len(self.heads), 0)

    @property
    def removed_parameters(self) -> int:
        """Return the exact number of removed parameters."""
        s = self.sizes
        return round(self.removed_heads.numel() * s.head_parameters + self.removed_groups.numel() * s.group_parameters
                     + self.neurons.numel() * s.neuron_parameters)

    @property
    def removed_fraction(self) -> float:
        """Return the exact removed fraction of all parameters of the model."""
        return self.removed_parameters / self.sizes.parameters

    @property
    def kept(self) -> dict[str, int]:
        """Return the sizes of a block after removal: heads, groups, neurons."""
        s = self.sizes
        return {"heads": s.heads - self.removed_heads.shape[1], "groups": s.groups - self.removed_groups.shape[1],
                "neurons": s.neurons - self.neurons.shape[1]}

    def __str__(self) -> str:
        s, kept = self.sizes, self.kept
        every = {s.blocks, len(s.head_blocks) or s.blocks, len(s.neuron_blocks) or s.blocks} == {s.blocks}
        some = "" if every else (f" ({len(s.head_blocks)} of the blocks have heads, {len(s.neuron_blocks)} have "
                                 f"neurons)")
        return (f"removes {self.removed_fraction:.4%} of {s.parameters:,} parameters: each of {s.blocks} blocks keeps "
                f"{kept['heads']} of {s.heads} heads, {kept['groups']} of {s.groups} groups, "
                f"{kept['neurons']} of {s.neurons} neurons{some}")


def check_indices(name: str, indices: Tensor, lead: tuple[int, ...], places: int) -> None:
    """Raise ValueError unless ``indices``, ``(*lead, k)``, ascend strictly within ``places`` and leave one place."""
    if indices.dtype != torch.long or tuple(indices.shape[:-1]) != lead or indices.shape[-1] >= max(places, 1):
        raise ValueError(f"plan.{name}: int64 of shape {lead} x k with k < {places} needed, got "
                         f"{indices.dtype} of shape {tuple(indices.shape)}")
    if indices.numel() and (indices.min() < 0 or indices.max() >= places or (indices.diff(dim=-1) <= 0).any()):
        raise ValueError(f"plan.{name}: places must ascend without repeats within 0 to {places - 1}")
