"""Catching what enters a module while data passes.  After the ``with`` the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block, the mode it had afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def inputs_to(modules: Iterable[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(i, x)`` with the first input of ``modules[i]`` every time it runs inside the block.

    Nothing is stored here: what ``see`` does not keep is freed, so memory does not grow with the number of batches.
    """
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            handle = module.register_forward_pre_hook(lambda _, args, i=i: see(i, args[0]))
            stack.callback(handle.remove)
        yield
