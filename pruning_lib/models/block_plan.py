"""The plan of a depth-pruning method: the residual blocks to remove.  Cutting is in ``surgery``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pruning_lib.models import families
from pruning_lib.models.families import BlockInfo


@dataclass(frozen=True)
class BlockPlan:
    """Residual blocks to remove from one model, an image network or a language model.

    Attributes
    ----------
    removed : names (paths) of the blocks to remove
    blocks : all residual blocks of the model the plan was made for, in forward order

    Raises
    ------
    ValueError
        for a name that is no block of the model, a name given twice, a block that changes the shape, or a plan that
        removes all blocks.
    """

    removed: tuple[str, ...]
    blocks: tuple[BlockInfo, ...]

    def __post_init__(self) -> None:
        names = [block.name for block in self.blocks]
        unknown = [name for name in self.removed if name not in names]
        if unknown:
            raise ValueError(f"no block is called {', '.join(map(repr, unknown))}; blocks: {', '.join(names)}")
        if len(set(self.removed)) < len(self.removed):
            raise ValueError(f"a block is named twice in {', '.join(self.removed)}; name each block once")
        fixed = [block for block in self.blocks if block.name in self.removed and not block.removable]
        if fixed:
            reason = next((block.reason for block in fixed if block.reason), "the shape changes there")
            removable = [block.name for block in self.blocks if block.removable]
            raise ValueError(f"{', '.join(block.name for block in fixed)} cannot be removed, {reason}; "
                             f"removable: {', '.join(removable) or 'none'}")
        if not self.kept:
            raise ValueError(f"the plan removes all {len(names)} blocks; keep at least one")

    @classmethod
    def of(cls, model: nn.Module, removed: Iterable[str]) -> BlockPlan:
        """Return the plan that removes the named blocks from ``model``."""
        return cls(tuple(removed), tuple(families.residual_blocks(model)))

    @property
    def kept(self) -> tuple[str, ...]:
        """Return the names of the kept blocks before renumbering, in forward order."""
        return tuple(block.name for block in self.blocks if block.name not in self.removed)

    @property
    def kept_per_stage(self) -> dict[int, int]:
        """Return the number of kept blocks per stage, as a dict stage -> number."""
        staying = Counter(block.stage for block in self.blocks if block.name not in self.removed)
        return {block.stage: staying[block.stage] for block in self.blocks}

    def __str__(self) -> str:
        per_stage = ", ".join(map(str, self.kept_per_stage.values()))
        return (f"removes {len(self.removed)} of {len(self.blocks)} blocks ({', '.join(self.removed) or 'none'}); "
                f"blocks kept per stage: {per_stage}")
