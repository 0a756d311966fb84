"""Trial runs of a network: inputs it accepts, a record of every module, copies with zero parameters."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (64, 224, 32, 28)  # of square images, tried in this order where a network does not declare its own


@dataclass
class Run:
    """Record of one module in one pass."""

    calls: int = 0
    kept: bool = False  # one tensor in, one of the same shape out
    shape: tuple[int, ...] = ()  # of the input


def refuse_wrappers(network: nn.Module) -> None:
    inner = "_orig_mod" if hasattr(network, "_orig_mod") else "module" if isinstance(
        network, nn.DataParallel | nn.parallel.DistributedDataParallel) else ""
    if inner:
        raise ValueError(f"this {type(network).__name__} is a wrapper; give the network itself, model.{inner}")
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("the network has no weights (meta device), so its blocks cannot be found by running it")


def example_of(network: nn.Module, given: Tensor | None) -> Tensor:
    """Return two inputs that the network accepts."""
    weight = next(network.parameters(), None)
    if weight is None:
        raise ValueError(f"this {type(network).__name__} has no parameters, so nothing can be removed")
    if given is not None:
        return given.to(weight.device, weight.dtype if given.is_floating_point() else given.dtype)
    convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise ValueError(f"this {type(network).__name__} has no 2-d convolution, so the shape of its input is unknown; "
                         f"give two inputs: image_networks.describe(network, example=...)")
    channels, problems, generator = convolution.in_channels, [], torch.Generator().manual_seed(0)
    for size in dict.fromkeys([*_declared(network), *((s, s) for s in SIZES)]):
        x = torch.rand(2, channels, *size, generator=generator).to(weight.device, weight.dtype)
        try:
            network(x)
            return x
        except Exception as error:  # networks raise many kinds for an image of another size
            problems.append(f"{size[0]} x {size[1]}: {error}")
    raise ValueError(f"this {type(network).__name__} accepts no image of {channels} channels ({'; '.join(problems)}); "
                     f"give two inputs: image_networks.describe(network, example=...)")


def _declared(network: Any) -> list[tuple[int, int]]:
    """Return the image size that a network states, as torchvision's ViT and all of timm do."""
    stated = getattr(network, "image_size", None)
    if stated is None:
        patches = getattr(getattr(network, "patch_embed", None), "img_size", None)
        settings = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
        stated = patches or (settings.get("input_size", (None,))[1:] if isinstance(settings, dict) else None)
    if isinstance(stated, int):
        return [(stated, stated)]
    return [(int(stated[0]), int(stated[1]))] if stated and len(stated) == 2 else []


def run(network: nn.Module, x: Tensor) -> tuple[list[str], dict[str, Run], Tensor]:
    """Return the names of all modules in the order in which they return, their records, and the logits."""
    order: list[str] = []
    runs = {name: Run() for name, _ in network.named_modules()}

    def see(name: str, args: tuple, output: Any) -> None:
        run = runs[name]
        run.calls += 1
        if args and isinstance(args[0], Tensor):
            run.shape = tuple(args[0].shape)
            run.kept = isinstance(output, Tensor) and output.shape == args[0].shape and output.dtype == args[0].dtype
        order.append(name)

    with ExitStack() as stack:
        for name, module in network.named_modules():
            handle = module.register_forward_hook(lambda _, args, output, name=name: see(name, args, output))
            stack.callback(handle.remove)
        output = network(x)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError(f"this {type(network).__name__} returns {_say(output)}; wrap it in a module that returns "
                         f"logits (N, classes)")
    return order, runs, output


def _say(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def inputs(network: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, tuple[tuple, dict]]:
    """Return the arguments of the named modules in one pass; tensors are copied, as modules may work in place."""
    given: dict[str, tuple[tuple, dict]] = {}

    def keep(name: str, args: tuple, named: dict) -> None:
        given[name] = tuple(map(copied, args)), {key: copied(value) for key, value in named.items()}

    with ExitStack() as stack:
        for name in names:
            handle = network.get_submodule(name).register_forward_pre_hook(
                lambda _, args, named, name=name: keep(name, args, named), with_kwargs=True)
            stack.callback(handle.remove)
        network(x)
    return given


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def zeroed(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.zero_()
    return module


def same(y: Any, x: Tensor) -> bool:
    if not isinstance(y, Tensor) or y.numel() != x.numel():
        return False
    exact = 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((y.flatten() - x.flatten()).abs().max() <= exact * x.abs().max())
