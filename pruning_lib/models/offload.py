"""Models that are larger than the memory of a device: their weights wait on disk or in host memory (accelerate).

A weight that waits is a ``meta`` tensor; a hook of accelerate brings it when its module runs.  Here: where inputs go,
weights at hand for a moment, a checkpoint that is read while it runs, and cutting weights that wait: they are cut
whenever they are brought.
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
    """Whether weights of this module (or anything in it) wait elsewhere."""
    return any(p.device.type == "meta" and _hook(owner) is not None for owner in module.modules()
               for p in owner.parameters(recurse=False))


def input_device(model: nn.Module) -> torch.device:
    """Where token numbers go."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = filter(None, (_hook(module) for module in model.modules()))
    return torch.device(next((hook.execution_device for hook in hooks if hook.execution_device is not None), "cpu"))


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` the module's own weights are where it runs."""
    with align_module_device(module):
        yield


def load_from_disk(folder: Path, device: torch.device, **how: Any) -> nn.Module:
    """The language model in ``folder``, ready to evaluate on ``device`` without ever being there as a whole.

    Every weight stays in its file and is brought to ``device`` for the time its module runs.

    Parameters
    ----------
    how : further arguments of ``from_pretrained``
    """
    from transformers import AutoModelForCausalLM

    with _quiet("accelerate.big_modeling"):  # it warns of weights on the meta device, where they are meant to be
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, **how)
    for module in loaded.modules():
        for part in _hooks(module):  # accelerate would have a model that is on disk altogether run on the CPU
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
    """Keep only the places ``keep`` of a weight that waits; it stays where it is and is cut whenever it is brought."""
    hook, weight = cast(Any, _hook(module)), cast(Tensor, getattr(module, name))
    hook.weights_map = _SlicedWeights(hook.weights_map, name, keep, dim)
    shape = [len(keep) if i == dim else size for i, size in enumerate(weight.shape)]
    setattr(module, name, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device="meta"), requires_grad=False))


class _SlicedWeights(Mapping):
    """Weights by name; one of them is cut when it is read."""

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
    """The hook that brings the module's weights; None where they do not wait."""
    return next((part for part in _hooks(module) if getattr(part, "offload", False)), None)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [part for part in getattr(hook, "hooks", (hook,)) if part is not None]
