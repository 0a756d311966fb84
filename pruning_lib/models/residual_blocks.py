"""Residual blocks of any image network, found by running it.

A residual block adds a branch to its input.  Without its weights the branch is zero, so a block is recognised by trial:
with all parameters zero it returns its input.  Removing it puts ``Skipped`` in its place, which has no parameters and
no cost; all other modules keep their names.  Where a block is a sequence of such sums, as attention and MLP in a
transformer, each branch can be a unit of its own; the modules of a removed branch become ``Silent``.

Order of this file: results · placeholders · finding · blocks · branches of a block · classifier · removing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning_lib.models.parameter_counts import parameter_count
from pruning_lib.models.trial_runs import Run, copied, example_of, inputs, refuse_wrappers, run, same, zeroed


@dataclass(frozen=True)
class BlockInfo:
    """One residual block of a network in its present state."""

    name: str  # its path, e.g. "layer1.3"
    stage: int  # counted from 0; a block that changes the shape begins a stage
    removable: bool  # the shape is the same without it
    reason: str = ""  # why it has to stay, where the shape is not the reason


@dataclass(frozen=True)
class Unit:
    """The modules behind one removable block.

    Attributes
    ----------
    block : path of the block whose input the unit receives
    silenced : (path, values returned besides the tensor) of each module of a branch; empty if the whole block is one
    """

    block: str
    silenced: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Blocks, classifier and input shape of one network."""

    blocks: tuple[BlockInfo, ...]
    units: dict[str, Unit]  # of every removable block
    classifier: str | None  # path of the layer that maps features (N, P) to classes
    example: tuple[int, ...]  # shape of one input

    def without(self, removed: Iterable[str]) -> Layout:
        """Return the layout of the network without the named blocks."""
        gone = set(removed)
        return replace(self, blocks=tuple(block for block in self.blocks if block.name not in gone),
                       units={name: unit for name, unit in self.units.items() if name not in gone})


class Skipped(nn.Module):
    """Takes the place of a removed block: returns its input."""

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        return hidden_states


class Silent(nn.Module):
    """Takes the place of a module of a removed branch: returns zeros, and None for each further value."""

    def __init__(self, others: int = 0) -> None:
        super().__init__()
        self.others = others

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, *[None] * self.others) if self.others else zeros


def find(network: nn.Module, *, example: Tensor | None = None, blocks: Sequence[str] | None = None,
         branches: bool = False) -> Layout:
    """Return the layout of a network, found by running it on random images.

    Parameters
    ----------
    network : takes a batch of images and returns logits (N, classes)
    example : (N, channels, height, width) inputs to try it on; by default random ones of the size it declares
    blocks : names of the blocks, instead of those found; each has to keep the shape of its input
    branches : count attention and MLP of a block as blocks of their own, wherever they are separate sums

    Raises
    ------
    ValueError
        for a wrapped or language model, a network that accepts no image tried, or named blocks that cannot be left out.
    """
    refuse_wrappers(network)
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.inference_mode():
            x = example_of(network.eval(), example)
            order, runs, output = run(network, x)
            names = _named(network, runs, blocks) if blocks is not None else _residual(network, x, order, runs)
            units = {name: Unit(name) for name in names}
            if branches:
                units = _branches(network, x, units)
            _try_placeholders(network, units, x)
            return Layout(_infos(network, order, runs, units), units, _classifier(network, x, output),
                          tuple(x.shape[1:]))
    finally:
        for module, training in modes.items():
            module.training = training


# --- blocks -----------------------------------------------------------------------------------------------------------


def _residual(network: nn.Module, x: Tensor, order: list[str], runs: dict[str, Run]) -> list[str]:
    """Return the smallest modules that return their input when their parameters are zero, in the order of the data.

    A module with a single such module inside replaces it unless it is nothing but a container: the global response
    normalisation of ConvNeXt V2 adds to its input, but the block is the sum around it.
    """
    candidates = [name for name in order if name and runs[name].calls == 1 and runs[name].kept
                  and _may_be_block(network.get_submodule(name))]
    given = inputs(network, x, candidates)
    found: list[str] = []
    for name in candidates:  # inner modules return before outer ones
        args, named = given.pop(name)
        module, inside = network.get_submodule(name), [inner for inner in found if inner.startswith(f"{name}.")]
        if len(inside) > 1 or not _returns_its_input(zeroed(copy.deepcopy(module)), args, named):
            continue
        if inside:
            hollow = copy.deepcopy(module)
            remove(hollow, Unit(inside[0].removeprefix(f"{name}.")))
            if _returns_its_input(hollow, args, named):
                continue
            found.remove(inside[0])
        found.append(name)
    return found


def _may_be_block(module: nn.Module) -> bool:
    own_layer = type(module).__module__.startswith("torch.nn") and not list(module.children())
    return not own_layer and next(module.parameters(), None) is not None


def _returns_its_input(module: nn.Module, args: tuple, named: dict) -> bool:
    x = args[0].clone()
    if not bool(x.abs().max() > 0):
        return False  # zeros in, zeros out says nothing
    try:
        return same(module(*map(copied, args), **named), x)
    except Exception:  # zeros may be invalid for a module: then it is not a block
        return False


def _named(network: nn.Module, runs: dict[str, Run], names: Sequence[str]) -> list[str]:
    """Return the names given by the user, after a check that each is a module that can be left out."""
    for name in names:
        if name not in runs:
            near = ", ".join(other for other in runs if other and runs[other].kept)[:300]
            raise ValueError(f"no module is called {name!r}; modules that keep the shape of their input: {near}")
        if runs[name].calls != 1 or not runs[name].kept:
            reason = f"runs {runs[name].calls} times" if runs[name].calls != 1 else "changes the shape of its input"
            raise ValueError(f"{name} cannot be left out, it {reason}")
        if any(other != name and other.startswith(f"{name}.") for other in names):
            raise ValueError(f"{name} contains another block that is named; name one of them")
    return [name for name in runs if name in set(names)]


def _infos(network: nn.Module, order: list[str], runs: dict[str, Run], units: dict[str, Unit]
           ) -> tuple[BlockInfo, ...]:
    """Return all blocks: the removable ones, and modules of the same class that change the shape."""
    wholes = {unit.block for unit in units.values()}
    kinds = {type(network.get_submodule(name)) for name in wholes} - {nn.Sequential, nn.ModuleList}
    fixed = {name for name in order if runs[name].calls == 1 and type(network.get_submodule(name)) in kinds
             and not any(name == whole or name.startswith(f"{whole}.") or whole.startswith(f"{name}.")
                         for whole in wholes)}
    infos: list[BlockInfo] = []
    stage, before = 0, None
    for name in (name for name in order if name in wholes | fixed):
        changed = name in fixed and not runs[name].kept
        stage += bool(infos) and (changed or before is not None and runs[name].shape != before)
        before = None if changed else runs[name].shape
        inside = [unit for unit in units if units[unit].block == name] or [name]
        infos += [BlockInfo(unit, stage, name in wholes) for unit in inside]
    return tuple(infos)


# --- branches of a block ----------------------------------------------------------------------------------------------


def _branches(network: nn.Module, x: Tensor, units: dict[str, Unit]) -> dict[str, Unit]:
    """Return the branches of all blocks; a block without separable branches stays one unit."""
    given, found = inputs(network, x, units), {}
    for name in units:
        args, named = given.pop(name)
        inside = _branches_of(network.get_submodule(name), args, named)
        for branch in inside if len(inside) > 1 else []:
            largest = max(branch, key=lambda child: parameter_count(network.get_submodule(f"{name}.{child[0]}")))[0]
            found[f"{name}.{largest}"] = Unit(name, tuple((f"{name}.{child}", others) for child, others in branch))
        if len(inside) < 2:
            found[name] = units[name]
    return found


def _branches_of(block: nn.Module, args: tuple, named: dict) -> list[list[tuple[str, int]]]:
    """Return the children of each branch, with the number of values they return besides the tensor.

    With all parameters zero, the modules that receive the input of the block open a branch; the modules behind receive
    zeros.  Each branch is then silenced alone, which has to equal the block with the weights of that branch zero.
    """
    x, children, branches = args[0].clone(), _children(block), []
    for name, opens, others in _run_zeroed(block, args, named, children, x):
        if opens:
            branches.append([(name, others)])
        elif branches:
            branches[-1].append((name, others))
    for branch in branches:
        weightless, silenced = copy.deepcopy(block), copy.deepcopy(block)
        for name, others in branch:
            zeroed(weightless.get_submodule(name))
            setattr(silenced, name, Silent(others))
        try:
            first, second = ([copied(value) for value in args] for _ in range(2))
            if not same(silenced(*first, **named), weightless(*second, **named)):
                return []
        except Exception:  # a shape that zeros of the input do not have: this block is one unit
            return []
    return branches


def _children(block: nn.Module) -> list[str]:
    return [name for name, child in block.named_children() if next(child.parameters(), None) is not None]


def _run_zeroed(block: nn.Module, args: tuple, named: dict, children: list[str], x: Tensor
                ) -> list[tuple[str, bool, int]]:
    """Return (child, whether it received the input of the block, further values) in the order of the data."""
    work, seen = zeroed(copy.deepcopy(block)), []

    def see(name: str, args: tuple, output: Any) -> None:
        received = bool(args) and isinstance(args[0], Tensor) and same(args[0], x)
        seen.append((name, received, len(output) - 1 if isinstance(output, tuple) else 0))

    for name in children:
        work.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: see(name, args, output))
    work(*map(copied, args), **named)
    return seen if len({name for name, *_ in seen}) == len(seen) else []


# --- classifier -------------------------------------------------------------------------------------------------------


def _classifier(network: nn.Module, x: Tensor, output: Tensor) -> str | None:
    """Return the path of the last linear layer or 1 x 1 convolution if its output is the output of the network."""
    found: list[str] = []
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}:
                handle = module.register_forward_hook(
                    lambda _, args, y, name=name: found.append(name) if torch.equal(y.flatten(1), output) else None)
                stack.callback(handle.remove)
        network(x)
    return found[-1] if found else None


# --- removing ---------------------------------------------------------------------------------------------------------


def bypasses(network: nn.Module, unit: Unit) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return the modules of a unit, each with the forward that leaves it out."""
    if not unit.silenced:
        return [(network.get_submodule(unit.block), Skipped().forward)]
    return [(network.get_submodule(path), Silent(others).forward) for path, others in unit.silenced]


def remove(network: nn.Module, unit: Unit) -> None:
    """Put parameter-free placeholders in the place of a unit."""
    for path, placeholder in _placeholders(unit):
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, placeholder)


def _placeholders(unit: Unit) -> list[tuple[str, nn.Module]]:
    if not unit.silenced:
        return [(unit.block, Skipped())]
    return [(path, Silent(others)) for path, others in unit.silenced]


def _try_placeholders(network: nn.Module, units: dict[str, Unit], x: Tensor) -> None:
    """Raise ValueError unless the network runs without any of its units; the network is restored."""
    originals = {path: network.get_submodule(path) for unit in units.values() for path, _ in _placeholders(unit)}
    try:
        for unit in units.values():
            remove(network, unit)
        network(x)
    except Exception as error:
        raise ValueError(f"without its residual blocks this {type(network).__name__} does not run: {error}; name the "
                         f"blocks that can be left out: image_networks.describe(network, blocks=...)") from error
    finally:
        for path, module in originals.items():
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, module)
