"""Slices the tensors of one block, and brings the counts that its modules keep up to date.

``surgery`` carries out plans with these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning_lib.models import offload
from pruning_lib.models.growth import Unplaced
from pruning_lib.models.language_families import Part
from pruning_lib.models.parts import keep

SIZE_NAMES = {("weight", 0): "out_features", ("weight", 1): "in_features"}


def cut_block(block: nn.Module, parts: Iterable[Part], counts: Mapping[str, int], kept: Mapping[str, Tensor]) -> None:
    """Keep only the given units of one block.

    Parameters
    ----------
    counts : how many of each unit the block has
    kept : numbers of the units that stay; a unit that is not named stays whole
    """
    for (parameter, axis), entries in keep(block, parts, counts, kept).items():
        owner, _, name = parameter.rpartition(".")
        module = block.get_submodule(owner)
        slice_tensor(module, name, entries, axis)
        if isinstance(module, nn.Linear) and (name, axis) in SIZE_NAMES:
            setattr(module, SIZE_NAMES[name, axis], len(entries))


def slice_tensor(module: nn.Module, name: str, entries: Tensor, axis: int) -> None:
    """Keep the given entries of a parameter or buffer along one axis."""
    if offload.is_offloaded(module):
        offload.slice_offloaded(module, name, entries, axis)
        return
    tensor = getattr(module, name)
    replace_tensor(module, name, tensor.detach().index_select(axis, entries.to(tensor.device)))


def replace_tensor(module: nn.Module, name: str, data: Tensor) -> None:
    """Put ``data`` in the place of a parameter or buffer; a parameter stays frozen if it was."""
    old = getattr(module, name)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(data, requires_grad=old.requires_grad) if is_parameter else data)


def refresh(module: nn.Module, reference: nn.Module) -> None:
    """Copy the numbers that modules keep for themselves (counts of heads, sizes) from a network of the new sizes.

    Raises
    ------
    Unplaced
        when a tensor has another shape in that network: a plain reload would refuse it.
    """
    theirs = dict(reference.named_modules())
    for name, ours in module.named_modules():
        for key, value in vars(theirs.get(name, ours)).items():
            if type(value) in (int, float) and vars(ours).get(key) != value:
                setattr(ours, key, value)
    check_shapes(module, reference)


def check_shapes(module: nn.Module, reference: nn.Module) -> None:
    """Raise Unplaced unless all tensors have the shapes they have in ``reference``."""
    shapes, wanted = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (module, reference))
    for name in shapes:
        if shapes[name] != wanted.get(name):
            raise Unplaced(f"{name} would have the shape {shapes[name]}, transformers loads {wanted.get(name)}")


def state(config: Any, values: Mapping[str, int]) -> None:
    """Write sizes into a config; the head width is left alone where it is computed from others."""
    for name, value in values.items():
        try:
            setattr(config, name, value)
        except AttributeError:
            if name != "head_dim":
                raise


def zero(tensor: Tensor, entries: Tensor, axis: int) -> None:
    """Set the given entries of a tensor along one axis to zero."""
    with torch.no_grad():
        tensor.index_fill_(axis, entries.to(tensor.device), 0)
