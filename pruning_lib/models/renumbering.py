"""Renumbers the blocks of a language model from which blocks were removed: in its config and in its modules.

A config may list something for every block (``layer_types``), name blocks by number (``mlp_only_layers``) or count the
blocks in front (``first_k_dense_replace``).  Which of these a field does is tried: transformers has to build every
remaining block at its new place as it built it at the old one.
Order of this file: blocks · fields · candidates · comparison · modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

from torch import nn

from pruning_lib.models import growth
from pruning_lib.models.growth import NUMBERS, Unplaced, kind, settings

COUNTS_BLOCKS = re.compile("dense|layer|block|start|end")  # names of fields that may count the blocks in front
PERIOD = re.compile("interval|period|step|every")  # or that certainly do not
Values = dict[str, Any]  # config field -> value


def fixed(model: nn.Module, path: str) -> dict[int, str]:
    """Return the numbers of the blocks that cannot be removed alone, with the reason; ``path`` is that of the blocks.

    Blocks of one kind are alike, so of a model with one kind one block is tried.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(path))
    kinds = {(kind(block), tuple((name, tuple(t.shape)) for name, t in block.state_dict().items())) for block in blocks}
    tried, found = range(len(blocks)) if len(kinds) > 1 else range(1), {}
    for i in tried if len(blocks) > 1 else ():
        try:
            new_fields(model, path, [j != i for j in range(len(blocks))])
        except ValueError as error:
            found[i] = str(error)
    return found if len(kinds) > 1 else dict.fromkeys(range(len(blocks)), found[0]) if found else {}


def new_fields(model: nn.Module, path: str, stays: Sequence[bool], *, known: bool = False) -> Values:
    """Return the config fields that describe ``model`` without the blocks for which ``stays`` is False.

    Parameters
    ----------
    path : of the list of blocks
    known : the family has a record; its blocks differ in lists of the config at most

    Raises
    ------
    ValueError
        when no config describes that network, with the first difference of the one that transformers would build.
    """
    candidates, problem = _candidates(model, stays), ""
    if known:
        return next(candidates)
    before = _built(model, path, {})
    for values in candidates:
        try:
            difference = _difference(before, _built(model, path, values), stays)
        except Unplaced as error:
            difference = str(error)
        if not difference:
            return values
        problem = problem or difference
    gone = ", ".join(str(i) for i, kept in enumerate(stays) if not kept)
    raise ValueError(f"without the blocks {gone} this network could not be stored, no config describes it: {problem}. "
                     f"Remove other blocks; the last ones are the likeliest to do")


# --- candidates -------------------------------------------------------------------------------------------------------


def _candidates(model: nn.Module, stays: Sequence[bool]) -> Iterator[Values]:
    """Yield the fields that may describe the network, the likeliest first."""
    config = growth.text_config(cast(Any, model).config)
    known = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    lists = {name: value for name, value in known.items() if isinstance(value, list) and value}
    counts: Values = {name: sum(stays) for name in _block_count_fields(config, len(stays))}
    per_block: Values = {name: [v for v, kept in zip(value, stays, strict=True) if kept]
                         for name, value in lists.items() if "layer" in name and len(value) == len(stays)}
    new = [n - 1 for n in accumulate(map(int, stays))]
    named: Values = {name: [new[v] for v in value if stays[v]] for name, value in lists.items()
                     if _names_blocks(value, len(stays))}
    in_front: Values = {name: sum(stays[:value]) if "end" not in name else sum(stays[:value + 1]) - 1
                        for name, value in known.items() if type(value) is int and 0 < value <= len(stays)
                        and name not in counts and COUNTS_BLOCKS.search(name) and not PERIOD.search(name)}
    all_lists: Values = {name: [v for v, kept in zip(value, stays, strict=True) if kept]
                         for name, value in lists.items() if len(value) == len(stays)}
    own = {int(i): fields for i, fields in (config.to_dict().get("per_layer_config") or {}).items()}
    if own:  # after the number of blocks, which it is checked against
        per_block = all_lists = all_lists | {"per_layer_config": {new[i]: own[i] for i in own if stays[i]}}
    for more in (per_block, per_block | named, all_lists):
        yield counts | more
        for name, value in in_front.items():
            yield counts | more | {name: value}
        yield counts | more | in_front


def _block_count_fields(config: Any, count: int) -> list[str]:
    """Return the config fields that state the number of blocks: of an encoder-decoder those of the decoder."""
    known = [name for name in ("decoder_layers", "num_decoder_layers") if hasattr(config, name)]
    return known or [name for name in ("num_hidden_layers",) if getattr(config, name, None) == count]


def _names_blocks(value: list, blocks: int) -> bool:
    """Return whether a list can hold numbers of blocks."""
    return all(type(v) is int and v in range(blocks) for v in value) and value == sorted(set(value))


# --- comparison -------------------------------------------------------------------------------------------------------


Built = tuple[list[nn.Module], dict[str, tuple[int, ...]]]


def _built(model: nn.Module, path: str, values: Values) -> Built:
    """Return the blocks that transformers builds, without weights, and the shapes of the tensors outside of them."""
    network = growth.rebuilt(model, values)
    outside = {name: tuple(t.shape) for name, t in network.state_dict().items() if not name.startswith(f"{path}.")}
    return list(cast(nn.ModuleList, network.get_submodule(path))), outside


def _difference(dense: Built, cut: Built, stays: Sequence[bool]) -> str:
    """Return how a remaining block is built in another way at its new place; empty if none is."""
    (before, outside), (after, others) = dense, cut
    if outside != others:
        name = next(name for name in {**outside, **others} if outside.get(name) != others.get(name))
        return f"the size of {name} follows the number of blocks"
    kept = [i for i, stay in enumerate(stays) if stay]
    if len(kept) != len(after):
        return f"transformers builds {len(after)} blocks of it, not {len(kept)}"
    for place, (i, block) in enumerate(zip(kept, after, strict=True)):
        follows = {(i, place), (len(before), len(after))}
        for name, old, new in _facts(before[i], block):
            if old != new and not (NUMBERS.search(name) and (old, new) in follows):
                return f"block {i} would have {name} = {new} instead of {old}"
    return ""


def _facts(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, one value, other value) of everything that two blocks compute with, except weights."""
    shapes = [{name: tuple(t.shape) for name, t in block.state_dict().items()} for block in (before, after)]
    for name in sorted({*shapes[0], *shapes[1]}):
        yield name, shapes[0].get(name), shapes[1].get(name)
    theirs = dict(after.named_modules())
    for name, module in before.named_modules():
        other = theirs.get(name, nn.Identity())
        yield name or "its class", type(module).__name__, type(other).__name__
        for key, value in settings(module).items():
            yield f"{name}.{key}".strip("."), value, settings(other).get(key)


# --- modules ----------------------------------------------------------------------------------------------------------


def renumber(model: nn.Module, path: str, stays: Sequence[bool], values: Values) -> None:
    """Write new fields into the config, and new numbers into the modules of a model whose blocks are gone already.

    ``layer_idx`` is the place of an attention module in the key/value cache.
    """
    config = growth.text_config(cast(Any, model).config)
    for name, value in values.items():
        setattr(config, name, value)
    kept = [i for i, stay in enumerate(stays) if stay]
    for new, (old, block) in enumerate(zip(kept, cast(nn.ModuleList, model.get_submodule(path)), strict=True)):
        for module in block.modules():
            for key, value in settings(module).items():
                if key == "layer_idx" or type(value) is int and value == old and "idx" in key:
                    setattr(module, key, new)
