"""Catching what enters or leaves a module while data passes, and passing a block by.

Everything here is a ``with``: after it the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from pruning_lib.models import families


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the ``with``, afterwards every module in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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


@contextmanager
def outputs_of(modules: Iterable[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(i, y)`` with the output of ``modules[i]`` every time it runs inside the block.

    A later layer may work in place: a ``see`` that keeps ``y`` beyond the call has to clone it.
    """
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            handle = module.register_forward_hook(lambda _, args, y, i=i: see(i, y))
            stack.callback(handle.remove)
        yield


@contextmanager
def skip_block(model: nn.Module, block_name: str) -> Iterator[None]:
    """Inside the ``with``, one residual block hands on its input and does not run; may be nested.

    The network then computes bit for bit what it computes with the block removed.  A language model's cache stays empty
    for a block that does not run: generate with ``use_cache=False``.

    Parameters
    ----------
    block_name : path of a removable block, as ``families.residual_blocks(model)`` gives it

    Raises
    ------
    ValueError
        for anything but a removable block, with the names of those.
    """
    _refuse_unless_removable(model, block_name)
    with _forwarding(model.get_submodule(block_name), _identity):
        yield


@contextmanager
def resume_after(model: nn.Module, block_name: str, x: Tensor) -> Iterator[None]:
    """Inside the ``with``, block ``block_name`` gives ``x`` whatever it is given, and no block before it runs.

    With what enters the block as ``x``, the network computes what it computes with the block bypassed, and only the
    blocks behind are paid for.  ``x`` has to come from the inputs the network is then called with.

    Raises
    ------
    ValueError
        for anything but a removable block, as ``skip_block`` does.
    """
    _refuse_unless_removable(model, block_name)
    with ExitStack() as stack:
        for info in families.residual_blocks(model):
            here = info.name == block_name
            stack.enter_context(_forwarding(model.get_submodule(info.name), (lambda *_, **__: x) if here else _identity))
            if here:
                break
        yield


@contextmanager
def only_block(model: nn.Module, block_name: str, x: Tensor | None) -> Iterator[None]:
    """Inside the ``with`` no block but ``block_name`` runs, and that one is given ``x``; None for what comes anyway.

    The network itself makes what else a block wants (positions, masks), so ``x`` has to come from the inputs the
    network is then called with.  Take what the block gives with ``outputs_of``.
    """
    _refuse_unless_removable(model, block_name)
    with ExitStack() as stack:
        for info in families.residual_blocks(model):
            if info.name != block_name:
                stack.enter_context(_forwarding(model.get_submodule(info.name), _identity))
        if x is not None:
            hook = model.get_submodule(block_name).register_forward_pre_hook(lambda _, args: (x, *args[1:]))
            stack.callback(hook.remove)
        yield


def _refuse_unless_removable(model: nn.Module, block_name: str) -> None:
    removable = [block.name for block in families.residual_blocks(model) if block.removable]
    if block_name not in removable:
        raise ValueError(f"{block_name!r} is not a block that can be left out; removable: {', '.join(removable)}")


@contextmanager
def _forwarding(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Give ``module`` another forward for the time of a block."""
    state = module.__dict__
    before = state.get("forward")  # something else may have put its own there: an outer ``skip_block``, accelerate
    state["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del state["forward"]
        else:
            state["forward"] = before


def _identity(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
    """The first argument; the name is the one decoder blocks give it."""
    return hidden_states
