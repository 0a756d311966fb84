"""Context managers that record the inputs and outputs of modules, and that skip blocks.

After each ``with`` block the model is in its previous state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, cast

from torch import Tensor, nn

from pruning_lib.models import families
from pruning_lib.models.residual_blocks import bypasses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode (no dropout); afterwards restore the mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def inputs_to(modules: Iterable[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(i, x)`` with the first input of ``modules[i]`` every time it runs inside the ``with`` block.

    No input is stored here, so memory grows with the number of batches only if ``see`` keeps them.
    """
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            handle = module.register_forward_pre_hook(lambda _, args, i=i: see(i, args[0]))
            stack.callback(handle.remove)
        yield


@contextmanager
def outputs_of(modules: Iterable[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(i, y)`` with the output of ``modules[i]`` every time it runs inside the ``with`` block.

    A later layer may change ``y`` in place, so ``see`` must clone it to keep it beyond the call.
    """
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            handle = module.register_forward_hook(lambda _, args, y, i=i: see(i, y[0] if isinstance(y, tuple) else y))
            stack.callback(handle.remove)
        yield


def by_prompt(x: Tensor, mask: Tensor) -> Tensor:
    """Return x as (B, T, columns), mask being (B, T): some families put all tokens in one row before the MLP.

    Raises
    ------
    ValueError
        for a family that puts tokens of its own beside those of the prompt (CPM-Ant, ProphetNet), or in another order
        (XLNet).
    """
    if x.ndim == 3 and x.shape[:2] != mask.shape:
        raise ValueError(f"activations of this family have the shape {tuple(x.shape[:2])} where the prompts have "
                         f"{tuple(mask.shape)}: it adds tokens of its own, or orders them otherwise, so they cannot be "
                         f"assigned to prompts; use method='magnitude' with reconstruction='none', which looks at "
                         f"weights alone")
    return x if x.ndim == 3 else x.view(*mask.shape, -1)


@contextmanager
def skip_block(model: nn.Module, block_name: str) -> Iterator[None]:
    """Skip one residual block inside the ``with`` block: its output is its input; may be nested.

    The result equals, bit for bit, that of the network without the block.  The key/value cache of a skipped decoder
    block stays empty: generate with ``use_cache=False``.

    Parameters
    ----------
    block_name : path of a removable block, as ``families.residual_blocks(model)`` gives it

    Raises
    ------
    ValueError
        for a name that is no removable block; the message lists the removable blocks.
    """
    _refuse_unless_removable(model, block_name)
    with ExitStack() as stack:
        for module, forward in bypasses(model, families.unit(model, block_name)):
            stack.enter_context(_forwarding(module, _as_block(model, forward)))
        yield


@contextmanager
def resume_after(model: nn.Module, block_name: str, x: Tensor) -> Iterator[None]:
    """Resume the forward pass after block ``block_name``: its output is ``x``, and no block before it runs.

    If ``x`` is the input of the block, the result equals that of the network with the block skipped, and only the
    blocks behind it are computed.  ``x`` must come from the same inputs as the next forward pass.

    Raises
    ------
    ValueError
        for a name that is no removable block, as in ``skip_block``.
    """
    _refuse_unless_removable(model, block_name)
    unit = families.unit(model, block_name)
    with ExitStack() as stack:
        for path in _blocks_before(model, unit.block):
            stack.enter_context(_forwarding(model.get_submodule(path), _as_block(model, _identity)))
        block = model.get_submodule(unit.block)
        if unit.silenced:  # a branch: the block runs without it
            hook = block.register_forward_pre_hook(lambda _, args: (x, *args[1:]))
            stack.callback(hook.remove)
            for module, forward in bypasses(model, unit):
                stack.enter_context(_forwarding(module, _as_block(model, forward)))
        else:
            stack.enter_context(_forwarding(block, _as_block(model, lambda *_, **__: x)))
        yield


def _blocks_before(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the blocks before ``path`` that need not run.

    In a network of no family, blocks that change the shape run all the same: later modules may depend on the shape.
    """
    anywhere = families.image_family(model) is not None or not families.is_image_network(model)
    before: list[str] = []
    for info in families.residual_blocks(model):
        here = families.unit(model, info.name).block
        if here == path:
            return before
        if (anywhere or info.removable) and here not in before:
            before.append(here)
    return before


@contextmanager
def only_block(model: nn.Module, block_name: str, x: Tensor | None) -> Iterator[None]:
    """Run no block but ``block_name``, with input ``x``; None leaves its input unchanged.

    The other arguments of the block (positions, masks) are computed by the model as usual, so ``x`` must come from the
    same inputs as the next forward pass.  Record the output of the block with ``outputs_of``.
    """
    blocks = [block.name for block in families.residual_blocks(model)]
    if families.is_image_network(model) or block_name not in blocks:
        _refuse_unless_removable(model, block_name)  # language models: all blocks run alone
    with ExitStack() as stack:
        for info in families.residual_blocks(model):
            if info.name != block_name:
                for module, forward in bypasses(model, families.unit(model, info.name)):
                    stack.enter_context(_forwarding(module, _as_block(model, forward)))
        if x is not None:
            entered = model.get_submodule(families.unit(model, block_name).block)
            hook = entered.register_forward_pre_hook(lambda _, args: (x, *args[1:]))
            stack.callback(hook.remove)
        yield


@contextmanager
def silenced(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let linear layers give zeros, without computing anything, inside the ``with`` block."""
    with ExitStack() as stack:
        for layer in layers:
            zeros = partial(_zeros, families.matrix(layer).shape[0])
            stack.enter_context(_forwarding(layer, zeros))
        yield


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


def _refuse_unless_removable(model: nn.Module, block_name: str) -> None:
    removable = [block.name for block in families.residual_blocks(model) if block.removable]
    if block_name not in removable:
        raise ValueError(f"{block_name!r} is not a removable block; removable: {', '.join(removable)}")


@contextmanager
def _forwarding(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward method of ``module`` inside the ``with`` block."""
    state = module.__dict__
    before = state.get("forward")  # may be set already, by an outer ``skip_block`` or by accelerate
    state["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del state["forward"]
        else:
            state["forward"] = before


def _as_block(model: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a forward that gives a tuple where the blocks of the model do."""
    if families.is_image_network(model):
        return forward
    outputs = families.family_of(model).block_outputs or _in_tuple(cast(Any, type(families.blocks(model)[0])))
    if not outputs:
        return forward
    return lambda *args, **named: (forward(*args, **named), *[None] * (outputs - 1))


@cache
def _in_tuple(kind: Any) -> bool:
    """Return whether blocks of a class put their output into a tuple, as more of them do in transformers 4."""
    if not kind.__module__.startswith("transformers."):
        return False
    return "outputs = (hidden_states,)" in inspect.getsource(kind.forward)


def _identity(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
    """Return the first argument; its name is the one used by decoder blocks."""
    return hidden_states
