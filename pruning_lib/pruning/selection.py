"""Selection of heads and neurons: turns importances into a plan, for all width-pruning methods.

A method gives every head and neuron an importance; ``choose`` turns importances into a ``Plan``.
Order of this file: Importance · choose · numbers of units · places.  Cutting is in ``surgery``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning_lib._files import replacing
from pruning_lib.models import equivalents, families, possible_cuts
from pruning_lib.models.families import Sizes
from pruning_lib.models.plan import GROUPED, Plan

RULES = ("lowest", "highest", "random")
MULTIPLE = 32  # numbers in a block of a quantised file
SCOPES = ("heads_and_neurons", "neurons", "heads")
SAME_SHARE = "same_share"


@dataclass(frozen=True)
class Importance:
    """Importance of each head and neuron; larger means keep.

    Attributes
    ----------
    heads : (La, H) float32, one row per block that has heads: all blocks, but of mixed architectures
    neurons : (Lm, M) float32, one row per block that has neurons
    made_with : conditions of the measurement (method, data, prompts, seed)
    """

    heads: Tensor
    neurons: Tensor
    made_with: dict

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, so that one calibration serves many fractions."""
        path = Path(path)
        tensors = {"heads": self.heads.contiguous(), "neurons": self.neurons.contiguous()}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata={"made_with": json.dumps(self.made_with)})

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read a file written by ``save``; raise ValueError for any other file."""
        try:
            with safe_open(path, "pt") as file:
                made_with = json.loads(file.metadata()["made_with"])
                return cls(file.get_tensor("heads"), file.get_tensor("neurons"), made_with)
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"{path} holds no importance; make one with Importance.save ({error})") from error


def stacked(scores: list[Tensor]) -> Tensor:
    """Return scores as (blocks with such units, units) float32 on the CPU; (0, 0) where the family has no such unit."""
    return torch.stack(scores).float().cpu() if scores else torch.zeros(0, 0)


def choose(importance: Importance, model: nn.Module, *, removed_fraction: float, scope: str = "heads_and_neurons",
           rule: str = "lowest", grouped_query: str = "whole_groups", heads_removed: int | str | None = 0,
           multiple_of: int | None = None, seed: int = 0) -> Plan:
    """Choose heads and neurons to remove so that ``removed_fraction`` of *all* parameters is removed.

    As in the published code, the same share of heads and of neurons is removed.  Heads are removed in whole units, the
    number of neurons absorbs the rounding, and the plan reaches the fraction to within one neuron per block.  (The
    published code counts the removed parameters in whole blocks, and turns a fraction of a head left by rounding into
    the same fraction of one neuron.)

    Parameters
    ----------
    importance : heads (La, H) and neurons (Lm, M)
    removed_fraction : fraction of all parameters to remove, embeddings included, 0 <= x < 1
    scope : parts that may be removed, ``"heads_and_neurons"``, ``"neurons"`` or ``"heads"``; with heads alone
        the plan has the nearest fraction that whole units reach
    rule : ``"lowest"`` removes the least important, ``"highest"`` the most important (a control), ``"random"`` random
        ones
    grouped_query : ``"whole_groups"`` removes a key/value head with all its queries (smaller KV cache);
        ``"equal_queries"`` removes the same number of queries from every group (finer choice, same KV cache)
    heads_removed : query heads to remove in every block, by default 0, the best choice in the report;
        ``"same_share"`` removes the same share of heads and of neurons, as in the paper (None is an older name of it).
        With ``scope="heads"`` and 0, the number follows from the fraction
    multiple_of : number whose nearest multiple is the number of kept neurons per block; the plan states the fraction
        this reaches.  None: 32, the block length of quantised files, where the model itself has a multiple of 32
        neurons, else any number.  GPUs like 64 or 128; with an odd number the pruned model was up to three times slower
        than the dense one (row ``speed-llama-2-7b`` of the report).  1 hits the fraction to within one neuron
    seed : seed for ``rule="random"``

    Raises
    ------
    ValueError
        for a fraction that cannot be reached (the message gives the range), a multiple too coarse for it, or head
        counts that cannot be stored.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> prompts = pl.batches(["The sea is", "Once upon a time"], tokenizer)
    >>> plan = pl.choose(pl.importance(model, prompts), model, removed_fraction=0.2)
    >>> plan.kept
    {'heads': 6, 'groups': 3, 'neurons': 32}
    """
    for name, value, allowed in (("scope", scope, SCOPES), ("rule", rule, RULES),
                                 ("grouped_query", grouped_query, GROUPED)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; allowed: {', '.join(allowed)}")
    if not 0 <= removed_fraction < 1:
        raise ValueError(f"removed_fraction={removed_fraction}; give a fraction of all parameters, 0 <= fraction < 1")
    s = families.sizes(model)
    heads = _head_count(heads_removed, scope)
    _refuse_scope(model, s, scope, heads)
    if heads != 0 and scope != "neurons":
        possible_cuts.refuse_cut(model, grouped_query)
    if grouped_query == "equal_queries" and scope != "neurons" and s.heads == s.groups:
        raise ValueError("this model has one query head per key/value head; use grouped_query='whole_groups'")
    _check_importance(importance, s)
    units, neurons = _how_many(s, removed_fraction, scope, grouped_query, heads)
    neurons = _rounded(s, neurons, multiple_of,
                       units * _unit(s, grouped_query).parameters * _share(s, s.head_blocks))
    families.refuse_head_count(model, s.heads - units * _unit(s, grouped_query).heads)
    generator = torch.Generator().manual_seed(seed)
    if not s.heads:
        return Plan("whole_groups", torch.zeros(0, 0, dtype=torch.long),
                    _which(importance.neurons.float(), neurons, rule, generator), s)
    grouped = importance.heads.float().view(len(s.head_blocks), s.groups, -1)  # (La, G, H/G)
    per_unit = grouped.mean(-1) if grouped_query == "whole_groups" else grouped
    return Plan(grouped_query, _which(per_unit, units, rule, generator),
                _which(importance.neurons.float(), neurons, rule, generator), s)


def _refuse_scope(model: nn.Module, s: Sizes, scope: str, heads_removed: int | str | None) -> None:
    """Raise ValueError, with the reason, for heads or neurons that this type of model cannot lose."""
    refused = families.family_of(model).refused
    if not s.heads and scope != "neurons" and heads_removed != 0:
        way = " (or of equivalents.with_head_width(model), the same network as another type)" * bool(
            equivalents.entry(model))
        raise ValueError(f"heads of this model cannot be removed: {refused.get('heads')}. Use scope='neurons'{way}"
                         if s.neurons else f"neither heads nor neurons of this model can be removed: {refused}")
    if not s.neurons and scope != "heads":
        raise ValueError(f"neurons of this model cannot be removed: {refused.get('neurons')}. Use scope='heads'")


@dataclass(frozen=True)
class _Unit:
    """Smallest lossless cut of attention: query heads and parameters per unit, and number of units per block."""

    heads: int
    parameters: float
    count: int


def _unit(s: Sizes, grouped_query: str) -> _Unit:
    per_group = s.heads // max(s.groups, 1)
    if grouped_query == "whole_groups":
        return _Unit(per_group, per_group * s.head_parameters + s.group_parameters, s.groups)
    return _Unit(s.groups, s.groups * s.head_parameters, per_group)


def _head_count(heads_removed: int | str | None, scope: str) -> int | None:
    """Return the query heads to remove per block; None where their number follows from the fraction."""
    if heads_removed in (SAME_SHARE, None) or (scope == "heads" and heads_removed == 0):
        return None
    if not isinstance(heads_removed, int) or isinstance(heads_removed, bool):
        raise ValueError(f"heads_removed={heads_removed!r}; give a number of query heads per block, or {SAME_SHARE!r}")
    return heads_removed


def _how_many(s: Sizes, fraction: float, scope: str, grouped_query: str, heads_removed: int | None) -> tuple[int, int]:
    """Return the numbers of attention units and neurons to remove per block."""
    unit = _unit(s, grouped_query)
    target = fraction * s.parameters / s.blocks  # parameters per block
    per_unit, per_neuron = unit.parameters * _share(s, s.head_blocks), s.neuron_parameters * _share(s, s.neuron_blocks)
    if heads_removed is not None:
        candidates = [_units_of(heads_removed, unit, scope)]
    else:
        candidates = [0] if scope == "neurons" or not unit.count else list(range(unit.count))  # keep one unit
    if scope == "heads":
        units = min(candidates, key=lambda k: abs(k * per_unit - target))
        if abs(units * per_unit - target) > per_unit / 2 or (units == 0 < target):
            raise _unreachable(s, fraction, [(k * per_unit, 0) for k in candidates])
        return units, 0
    room = (s.neurons - 1) * per_neuron  # at least one neuron is kept
    rest = {k: round((target - k * per_unit) / per_neuron) for k in candidates}
    fitting = [k for k in candidates if 0 <= rest[k] < s.neurons]
    if not fitting:
        raise _unreachable(s, fraction, [(k * per_unit, room) for k in candidates])
    same_share = target / (per_unit * unit.count + s.neurons * per_neuron)
    units = min(fitting, key=lambda k: abs(k - same_share * unit.count))
    return units, rest[units]


def _share(s: Sizes, blocks: tuple[int, ...]) -> float:
    """Return the share of all blocks that have a unit; 1 in most families."""
    return len(blocks) / s.blocks if blocks else 1


def _rounded(s: Sizes, removed: int, multiple_of: int | None, with_heads: float) -> int:
    """Return the number of neurons to remove so that the nearest multiple of ``multiple_of`` is kept; 0 stays 0.

    A multiple with which less than half or more than twice as much is removed is too coarse.
    ``with_heads`` is the number of parameters per block that removed heads have.
    """
    if not s.neurons:
        return 0
    if multiple_of is None:
        multiple_of = MULTIPLE if s.neurons % MULTIPLE == 0 else 1
    if not 1 <= multiple_of <= s.neurons:
        raise ValueError(f"multiple_of={multiple_of}; a block of this model has {s.neurons} neurons, "
                         f"give 1 (any number) to {s.neurons}, for a GPU 8 or 64")
    kept = multiple_of * max(1, min(round((s.neurons - removed) / multiple_of), s.neurons // multiple_of))
    wanted, reached = (with_heads + n * s.neuron_parameters for n in (removed, s.neurons - kept))
    far = abs(s.neurons - removed - kept) > multiple_of / 2 or not wanted / 2 <= reached <= 2 * wanted
    if removed and far:
        raise _too_coarse(s, removed, multiple_of, with_heads)
    return s.neurons - kept if removed else 0


def _too_coarse(s: Sizes, removed: int, multiple_of: int, with_heads: float) -> ValueError:
    """Return the error for a fraction that no multiple comes near, with the fractions of the two next to it."""
    def share(kept: int) -> str:
        per_block = with_heads + (s.neurons - kept) * s.neuron_parameters * _share(s, s.neuron_blocks)
        return f"{kept} neurons per block remove {s.blocks * per_block / s.parameters:.4f}"

    below = max(multiple_of, (s.neurons - removed) // multiple_of * multiple_of)
    near = [share(kept) for kept in (below + multiple_of, below) if kept <= s.neurons]
    return ValueError(f"multiple_of={multiple_of} is too coarse: {s.neurons - removed} of {s.neurons} neurons per "
                      f"block were to be kept; {', '.join(near)} of all parameters. Give such a fraction, or a smaller "
                      f"multiple_of")


def _units_of(heads_removed: int, unit: _Unit, scope: str) -> int:
    if heads_removed == 0:
        return 0
    units, left = divmod(heads_removed, unit.heads)
    if scope == "neurons" and heads_removed:
        raise ValueError(f"heads_removed={heads_removed} with scope='neurons'; drop one of the two")
    if left or not 0 <= units < unit.count:
        allowed = [k * unit.heads for k in range(unit.count)]
        raise ValueError(f"heads_removed={heads_removed} is not a lossless cut of this model; allowed: {allowed}")
    return units


def _unreachable(s: Sizes, fraction: float, per_block: list[tuple[float, float]]) -> ValueError:
    """Return the error for an unreachable fraction, with all reachable ranges.

    ``per_block`` has, for every number of units, their parameters and the largest number that neurons can add.
    """
    ranges: list[list[float]] = []
    per_neuron = s.neuron_parameters * _share(s, s.neuron_blocks)
    for low, room in sorted(per_block):
        if ranges and low <= ranges[-1][1] + per_neuron:  # adjacent to the previous range
            ranges[-1][1] = low + room
        else:
            ranges.append([low, low + room])
    where = ", ".join(" to ".join(f"{s.blocks * n / s.parameters:.6f}" for n in dict.fromkeys(r)) for r in ranges)
    return ValueError(f"removed_fraction={fraction} cannot be reached with these arguments; reachable: {where} "
                      f"(one neuron and one unit of attention are kept in every block; embeddings are never removed)")


def lossless_cuts(model: nn.Module) -> dict[str, Any]:
    """Return the sizes of a language model, and every lossless cut of its heads with the fractions that it allows."""
    refused = possible_cuts.removable(model)
    stored = equivalents.with_head_width(model) if not refused["heads"] else model
    s = families.sizes(stored)
    per_group, cuts = s.heads // max(s.groups, 1), []
    all_neurons = len(s.neuron_blocks) * (s.neurons - 1) * s.neuron_parameters / s.parameters
    units = [("whole_groups", g * per_group, g * (per_group * s.head_parameters + s.group_parameters))
             for g in range(s.groups)]
    units += [("equal_queries", q * s.groups, q * s.groups * s.head_parameters) for q in range(1, per_group)]
    for cut, heads, parameters in units:
        reason = refused["heads"]
        try:
            possible_cuts.refuse_cut(stored, cut) if heads else None
            families.refuse_head_count(stored, s.heads - heads)
        except ValueError as error:
            reason = reason or str(error)
        least = len(s.head_blocks) * parameters / s.parameters
        most = least + all_neurons
        cuts.append({"grouped_query": cut, "heads_removed": heads, "least_fraction": least, "most_fraction": most,
                     "refused": reason})
    block = families.parameter_count(families.blocks(model)[0])
    return {"family": model.config.model_type, "stored_as": stored.config.model_type,  # type: ignore[union-attr]
            "parameters": s.parameters, "blocks": s.blocks,
            "heads": s.heads, "groups": s.groups, "head_width": s.head_width, "neurons": s.neurons, "width": s.width,
            "neurons_fraction": all_neurons, "head_blocks": len(s.head_blocks), "neuron_blocks": len(s.neuron_blocks),
            "block_fraction": block / s.parameters, "cuts": cuts, "refused": refused}


def _which(scores: Tensor, n: int, rule: str, generator: torch.Generator) -> Tensor:
    """Return the ``n`` places along the last axis to remove by ``rule``, ascending; ties are resolved by place."""
    if rule == "random":
        scores = torch.rand(scores.shape, generator=generator)
    order = scores.sort(dim=-1, descending=rule == "highest", stable=True).indices
    return order[..., :n].sort(dim=-1).values


def _check_importance(importance: Importance, s: Sizes) -> None:
    for name, scores, shape in (("heads", importance.heads, (len(s.head_blocks), s.heads)),
                                ("neurons", importance.neurons, (len(s.neuron_blocks), s.neurons))):
        if tuple(scores.shape) != shape and (0 not in shape or scores.numel()):
            raise ValueError(f"importance of {name} has shape {tuple(scores.shape)}, this model needs {shape}: "
                             f"it was measured on another model")
        if not torch.isfinite(scores).all():
            raise ValueError(f"importance of {name} holds NaN or infinity; measure it again in float32 or bfloat16")
