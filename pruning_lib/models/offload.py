"""Offloaded models, larger than the memory of a device: their weights are on disk or in host memory (accelerate).

An offloaded weight is a ``meta`` tensor; a hook of accelerate loads it when its module runs.
Order of this file: queries · loading weights for a moment · checkpoints run from disk · slicing of offloaded weights.
An offloaded weight is sliced every time it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Return True if weights of this module or of its submodules are offloaded."""
    return any(p.device.type == "meta" and _hook(owner) is not None for owner in module.modules()
               for p in owner.parameters(recurse=False))


def input_device(model: nn.Module) -> torch.device:
    """Return the device for token ids."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = filter(None, (_hook(module) for module in model.modules()))
    return torch.device(next((hook.execution_device for hook in hooks if hook.execution_device is not None), "cpu"))


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Load the own weights of a module to its device inside the ``with`` block."""
    with align_module_device(module):
        yield


def load_from_disk(folder: Path, device: torch.device, **how: Any) -> nn.Module:
    """Load the language model in ``folder`` so that it runs on ``device`` without ever being there as a whole.

    Every weight stays in its file and is on ``device`` only while its module runs.

    Parameters
    ----------
    how : further arguments of ``from_pretrained``
    """
    import transformers
    from transformers import AutoModelForCausalLM

    if transformers.__version__.startswith("4."):  # it cannot leave every weight on disk
        return cast(Any, AutoModelForCausalLM.from_pretrained(folder, **how)).to(device).eval()
    with _quiet("accelerate.big_modeling"):  # it warns of weights on the meta device, which is intended here
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, **how)
        except ValueError as error:
            if "offload_folder" not in str(error):
                raise
            # experts lie in files one by one and in the network together, so they cannot be read while it runs
            whole: Any = AutoModelForCausalLM.from_pretrained(folder, **how)
            return whole.to(device).eval()
    for module in loaded.modules():
        for part in _hooks(module):  # accelerate runs a model that is entirely on disk on the CPU
            part.execution_device = device
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return loaded.eval()


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def slice_offloaded(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    """Keep only the places ``keep`` of an offloaded weight; the file is unchanged, and every load slices the weight."""
    hook, weight = cast(Any, _hook(module)), cast(Tensor, getattr(module, name))
    hook.weights_map = _SlicedWeights(hook.weights_map, name, keep, dim)
    shape = [len(keep) if i == dim else size for i, size in enumerate(weight.shape)]
    setattr(module, name, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device="meta"), requires_grad=False))


class _SlicedWeights(Mapping):
    """Weights by name, one of which is sliced when it is read."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, keep: Tensor, dim: int) -> None:
        self.weights, self.name, self.keep, self.dim = weights, name, keep, dim

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        if name != self.name:
            return weight
        return weight.index_select(self.dim, self.keep.to(weight.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _hook(module: nn.Module) -> Any:
    """Return the hook that loads the weights of the module; None if they are not offloaded."""
    return next((part for part in _hooks(module) if getattr(part, "offload", False)), None)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [part for part in getattr(hook, "hooks", (hook,)) if part is not None]
