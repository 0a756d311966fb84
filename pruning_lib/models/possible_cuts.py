"""Possible cuts of a language model, with the reason for every unit that cannot be removed.

The command ``inspect`` and the book's page of model types call these functions.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

from torch import nn

from pruning_lib.models import equivalents, families
from pruning_lib.models.plan import GROUPED
from pruning_lib.models.toy_models import toy

SOME_BLOCKS = "only some blocks: "


def removable(model: nn.Module) -> dict[str, str]:
    """Return, for heads, neurons, experts and blocks, why they cannot be removed; empty where they can.

    A model without weights cannot be tried: a toy network of its type is.  A reason that begins with ``SOME_BLOCKS`` is
    that of the first of the blocks that have to stay.
    """
    family = families.family_of(model)
    refused = dict(family.refused)
    if family.found and not family.verified:
        with suppress(Exception):  # of a type whose toy network cannot be built, shapes alone tell
            refused = {**families.family_of(toy(cast(Any, model).config.model_type)).refused, **refused}
    if equivalents.entry(model):
        problem = _not_equivalent(model)
        refused = {**refused, "heads": problem, "neurons": problem and refused.get("neurons", "")}
    fixed = families.fixed_blocks(model)
    if fixed:
        some = "" if len(fixed) == len(families.blocks(model)) else SOME_BLOCKS
        refused = {"blocks": some + next(iter(fixed.values())), **refused}
    return {unit: refused.get(unit, "") for unit in ("heads", "neurons", "experts", "blocks")}


def _not_equivalent(model: nn.Module) -> str:
    """Return why a network cannot be written as one of a type that states its head width; empty where it can."""
    try:
        equivalents.with_head_width(model)
    except ValueError as error:
        return str(error)
    return ""


def refuse_cut(model: nn.Module, grouped_query: str) -> None:
    """Raise ValueError, with the other way, for a cut of heads that differs from masking in a model of this type."""
    reason = families.family_of(model).refused.get(grouped_query)
    if reason:
        other = next(name for name in GROUPED if name != grouped_query)
        raise ValueError(f"heads of this model cannot be removed with grouped_query={grouped_query!r}: {reason}; use "
                         f"grouped_query={other!r}")
