"""Image networks of any kind: described, written to a folder, read from one.

A description is attached to the network: its residual blocks, its classifier, and how to build it again.  Everything is
found if possible; ``describe`` adds the other facts.  The folder holds the weights, the names of the removed blocks
and the source; to read it, the source is built, the same blocks are removed, and the weights are filled in.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning_lib.models import residual_blocks, sources
from pruning_lib.models.cifar_resnet import Normalise
from pruning_lib.models.residual_blocks import BlockInfo, Layout, Unit
from pruning_lib.models.sources import Source

ATTRIBUTE = "pruning_description"  # of a network; it is copied with it


@dataclass(frozen=True)
class Description:
    """All that pruning knows of a network beside its modules.

    Attributes
    ----------
    layout : blocks that are there, classifier, shape of one input
    source : how to build the network with all its blocks; None until it is stated or guessed
    removed : units that were removed, by name
    mean, std : by which pixels in [0, 1] are normalised before they enter; None: the network takes its input as it is
    """

    layout: Layout
    source: Source | None = None
    removed: dict[str, Unit] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def describe(network: nn.Module, source: str | None = None, *, arguments: dict[str, Any] | None = None,
             blocks: Sequence[str] | None = None, branches: bool = False, example: Tensor | None = None,
             mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Description:
    """State the facts of an image network that cannot be found: how to build it, its blocks, its input.

    Call it before pruning; without it blocks are found, and networks of torchvision and timm are recognised on saving.

    Parameters
    ----------
    source : "torchvision:NAME", "timm:NAME" or "import:package.module:function", which build the network
    arguments : of that builder, plain values only
    blocks : names of the residual blocks, instead of those found; each has to keep the shape of its input
    branches : attention and MLP of a transformer block count as blocks of their own
    example : (2, channels, height, width) inputs, if the network accepts only images of an unusual size
    mean, std : one value per channel; from now on the network takes pixels in [0, 1] and normalises them by these

    Raises
    ------
    ValueError
        for a source that cannot be built again, and as ``residual_blocks.find`` does.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean={mean}, std={std}; give both, one value per channel, or neither")
    before = getattr(network, ATTRIBUTE, None)
    if before is not None and before.removed:
        raise ValueError("blocks of this network are removed already; describe it before the first cut")
    if before is not None and before.mean is not None and mean is not None:
        raise ValueError(f"this network normalises its input by {before.mean} and {before.std} already")
    layout = residual_blocks.find(network, example=example, blocks=blocks, branches=branches)
    stated = sources.parse(source, arguments or {}) if source else before.source if before else None
    if mean is not None and std is not None:
        network.register_forward_pre_hook(_Normalising(mean, std))
    found = Description(layout, stated, {}, tuple(mean) if mean else before.mean if before else None,
                        tuple(std) if std else before.std if before else None)
    setattr(network, ATTRIBUTE, found)
    return found


def description(network: nn.Module) -> Description:
    """Return the description of a network; a network without one gets it, found by running the network."""
    found: Description | None = getattr(network, ATTRIBUTE, None)
    return found if found is not None else describe(network)


def remove(network: nn.Module, names: Collection[str]) -> None:
    """Remove the named units in place, and note it in the description."""
    known = description(network)
    units = {name: known.layout.units[name] for name in names}
    for unit in units.values():
        residual_blocks.remove(network, unit)
    setattr(network, ATTRIBUTE, replace(known, layout=known.layout.without(names), removed={**known.removed, **units}))


def takes_pixels(network: nn.Module) -> bool:
    """Return whether the network normalises its input itself, so that it takes pixels in [0, 1]."""
    return hasattr(network, "normalise") or getattr(getattr(network, ATTRIBUTE, None), "mean", None) is not None


class _Normalising:
    """A hook that normalises the first argument of a network."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.normalise = Normalise(tuple(mean), tuple(std))

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.normalise.to(args[0].device, args[0].dtype)(args[0]), *args[1:])


def write(network: nn.Module, folder: Path, header: dict[str, Any]) -> None:
    """Write weights and description into ``folder``, as two files.

    Raises
    ------
    ValueError
        if nothing tells how to build the network again.
    """
    known = description(network)
    source = known.source or _recognised(network, known)
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    facts = {**header, "source": asdict(source), "mean": known.mean, "std": known.std,
             "kept_blocks": [block.name for block in known.layout.blocks],
             "removed": {name: asdict(unit) for name, unit in known.removed.items()}, "layout": asdict(known.layout)}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def _recognised(network: nn.Module, known: Description) -> Source:
    """Return the source of a network of torchvision or timm, and note it in the description."""
    def prune(other: nn.Module) -> None:
        for unit in known.removed.values():
            residual_blocks.remove(other, unit)

    source = sources.guess(network, prune)
    if source is None:
        kind = f"{type(network).__module__}:{type(network).__qualname__}"
        raise ValueError(f"nothing tells how to build this {type(network).__name__} again. Before pruning call "
                         f"image_networks.describe(network, 'timm:NAME' or 'torchvision:NAME' or 'import:{kind}', "
                         f"arguments={{...}}) with the builder of the network and its arguments")
    setattr(network, ATTRIBUTE, replace(known, source=source))
    return source


def read(facts: dict[str, Any], weights: dict[str, Tensor], *, allow_import: Collection[str] = ()) -> nn.Module:
    """Return the network that ``write`` wrote.

    Raises
    ------
    ValueError
        for a source that is unknown or not allowed, and weights or names that do not fit it.
    """
    source = Source(**facts["source"])
    network = sources.build(source, allow_import=allow_import)
    removed = {name: _unit(unit) for name, unit in facts["removed"].items()}
    try:
        for unit in removed.values():
            residual_blocks.remove(network, unit)
        # cloned: kernels may round differently where a tensor in a file has an unusual address
        network.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"the weights are not those of {source} with {source.arguments}: {error}") from error
    kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(kinds) == 1:
        network.to(kinds.pop())  # buffers that are not in the file
    mean, std = facts["mean"], facts["std"]
    if mean is not None:
        network.register_forward_pre_hook(_Normalising(mean, std))
    setattr(network, ATTRIBUTE, Description(_layout(facts["layout"]), source, removed, mean and tuple(mean),
                                            std and tuple(std)))
    return network.eval()


def _layout(facts: dict[str, Any]) -> Layout:
    return Layout(tuple(BlockInfo(**block) for block in facts["blocks"]),
                  {name: _unit(unit) for name, unit in facts["units"].items()}, facts["classifier"],
                  tuple(facts["example"]))


def _unit(facts: dict[str, Any]) -> Unit:
    return Unit(facts["block"], tuple((path, int(others)) for path, others in facts["silenced"]))


def random_inputs(network: nn.Module) -> Tensor:
    """Return two random inputs of the shape the network was described with, the same at each call."""
    weight = next(network.parameters())
    shape = description(network).layout.example
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
