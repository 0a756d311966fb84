"""Image networks by name: made fresh, written to a folder, read from one.

An ``ImageConfig`` says everything about a network but its weights.  A pruned network is described by the original it
was cut from and the blocks it still has; to read it, the original is laid out without weights, cut again by
``surgery``, and filled.  Every network takes pixels in [0, 1] and normalises them itself.
To add a network, add one function to ``NETWORKS`` (and a record to ``families.IMAGE_FAMILIES`` if it is of a new kind).
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pruning_lib._registry import Table
from pruning_lib.models import families, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD, CifarResNet, Normalise
from pruning_lib.models.keras_resnet import KerasResNet, PixelMean

FORMAT, VERSION = "pruning_lib image network", 1


@dataclass(frozen=True)
class ImageConfig:
    """What an image network is, without its weights.

    Attributes
    ----------
    network : key of ``NETWORKS``
    arguments : of that function; what is left out has the function's default
    mean, std : of pixels in [0, 1], one value per channel
    kept_blocks : names in the whole network of the blocks that are there, in the order data passes them; None: all
    """

    network: str
    arguments: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    kept_blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "kept_blocks"):  # JSON has lists only
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in self.arguments.items()}
        object.__setattr__(self, "arguments", arguments)


NETWORKS: Table = Table("image network")


@NETWORKS.register()
def cifar_resnet(depth: int = 56, shortcut: str = "A", channels: int = 3, classes: int = 10) -> nn.Module:
    # the normalisation is the config's, ``_normalising`` puts it in
    return CifarResNet(depth, shortcut, channels, classes, mean=(0.0,) * channels, std=(1.0,) * channels)


@NETWORKS.register()
def keras_resnet(blocks: Sequence[int] = (9, 9, 9), channels: int = 3, classes: int = 10, size: int = 32) -> nn.Module:
    return KerasResNet(blocks, channels, classes, size)


class _OnPixels:
    """Put before a torchvision network, it normalises what comes in; the names of the weights stay torchvision's."""

    normalise: Normalise

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(self.normalise(pixels))  # type: ignore[misc]


class ResNetOnPixels(_OnPixels, ResNet):
    pass


class MobileNetV2OnPixels(_OnPixels, MobileNetV2):
    pass


@NETWORKS.register()
def resnet18(classes: int = 1000) -> nn.Module:
    return ResNetOnPixels(BasicBlock, [2, 2, 2, 2], classes)


@NETWORKS.register()
def resnet34(classes: int = 1000) -> nn.Module:
    return ResNetOnPixels(BasicBlock, [3, 4, 6, 3], classes)


@NETWORKS.register()
def resnet50(classes: int = 1000) -> nn.Module:
    return ResNetOnPixels(Bottleneck, [3, 4, 6, 3], classes)


@NETWORKS.register()
def resnet101(classes: int = 1000) -> nn.Module:
    return ResNetOnPixels(Bottleneck, [3, 4, 23, 3], classes)


@NETWORKS.register()
def mobilenet_v2(classes: int = 1000) -> nn.Module:
    return MobileNetV2OnPixels(classes)


def build(config: ImageConfig | str, *, seed: int | torch.Generator) -> nn.Module:
    """A network with random weights; it carries its full description as ``network.config``.

    Convolutions are drawn as in He et al. 2015 (arXiv:1502.01852: normal, by the number of outputs); the dense layer is
    uniform within 1 / sqrt(inputs), without bias; batch norms begin at 1 and 0.

    Parameters
    ----------
    config : what to build, or a key of ``NETWORKS`` for that network with its defaults
    seed : a number or a generator; nothing is seeded globally

    Raises
    ------
    ValueError
        for an unknown network or argument, blocks that cannot be left out, or a normalisation of other channels.
    """
    network = _outline(ImageConfig(config) if isinstance(config, str) else config).to_empty(device="cpu")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features ** -0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, PixelMean):
            nn.init.zeros_(module.mean)  # until it is measured on training images
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no rule for the first weights of {type(module).__name__}; add one to networks.build")
    return _normalising(network)


def with_weights(config: ImageConfig, weights: dict[str, Tensor]) -> nn.Module:
    """The network ``config`` describes with these weights; ValueError when they are of another network."""
    network = _outline(config)
    # cloned: a tensor in a file lies at any address, and kernels may round differently where it is not a round one
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of {config.network} with {config.arguments}: {error}") from error
    network = _normalising(network)
    return network.to(next(network.parameters()).dtype)  # the normalisation too


def write(network: nn.Module, folder: Path) -> None:
    """Weights and config of a network made here into ``folder``, as two files."""
    config = getattr(network, "config", None)
    if not isinstance(config, ImageConfig):
        raise ValueError(f"this {type(network).__name__} has no config that says how to build it again; make it with "
                         f"networks.build(...) or models.load(...) and give it the weights with load_state_dict")
    weights = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    text = json.dumps({"format": FORMAT, "format_version": VERSION, **asdict(config)}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def write_new(network: nn.Module, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a network, and further files (name -> text), into a new ``folder``; it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as work:
        done = Path(work) / "done"
        done.mkdir()
        write(network, done)
        for name, text in (texts or {}).items():
            (done / name).write_text(text + "\n")
        if not folder.exists():  # another process may have been faster
            done.rename(folder)


def is_image_network(folder: Path) -> bool:
    """Whether a folder is one of ours, or has the weights of a CIFAR ResNet and no config."""
    if (folder / "config.json").is_file():
        return _described(folder).get("format") == FORMAT
    if not (folder / "model.safetensors").is_file():
        return False
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {"conv1.weight", "layer3.0.conv1.weight", "linear.weight"} <= set(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from error


def read(folder: Path) -> nn.Module:
    """The network in a folder for which ``is_image_network`` says yes.

    Raises
    ------
    ValueError
        for a config of a later version or with unknown values, broken weights, or weights that do not fit.
    """
    weights = _weights(folder)
    if not (folder / "config.json").exists():
        return with_weights(_inferred(weights), weights)
    described = _described(folder)
    if described.pop("format_version", None) != VERSION:
        raise ValueError(f"{folder}/config.json is not of format version {VERSION}; update pruning_lib")
    del described["format"]
    try:
        return with_weights(ImageConfig(**described), weights)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:  # fields or arguments that
        # this format does not have, sizes that no network can have
        raise ValueError(f"{folder}/config.json does not describe an image network: {error}") from error


def _outline(config: ImageConfig) -> nn.Module:
    """The network without weights (on the meta device), cut to the blocks it has."""
    make = NETWORKS[config.network]
    known = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    unknown = set(config.arguments) - set(known)
    if unknown:
        raise ValueError(f"{config.network} has no argument {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    arguments = {**known, **config.arguments}
    with torch.device("meta"):
        network = make(**arguments)
    channels = next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels
    if len(config.mean) != channels:
        raise ValueError(f"{config.network} takes images of {channels} channels, mean and std have {len(config.mean)} "
                         f"values; give one per channel, or 0 and 1 for no normalisation")
    names = tuple(block.name for block in families.residual_blocks(network))
    network.config = replace(config, arguments=arguments, kept_blocks=names)
    kept = names if config.kept_blocks is None else config.kept_blocks
    if [name for name in names if name in kept] != list(kept):
        raise ValueError(f"kept_blocks: {', '.join(kept)}; they must be blocks of {config.network} in its own order: "
                         f"{', '.join(names)}")
    return surgery.remove(network, BlockPlan.of(network, [name for name in names if name not in kept]), inplace=True)


def _normalising(network: Any) -> nn.Module:
    """Ready to evaluate, with the normalisation of its config; it is made last, being no part of the weights."""
    network.normalise = Normalise(network.config.mean, network.config.std)
    return network.eval()


def _inferred(weights: dict[str, Tensor]) -> ImageConfig:
    """Which CIFAR ResNet these are the weights of; its normalisation cannot be seen and is taken to be ImageNet's."""
    per_stage = [len({name.split(".")[1] for name in weights if name.startswith(f"layer{i}.")}) for i in (1, 2, 3)]
    if len(set(per_stage)) > 1:
        raise ValueError(f"stages of {', '.join(map(str, per_stage))} blocks and no config.json: what this network was "
                         f"cut from cannot be seen; write it with checkpoints.save")
    shortcut = "projection" if any(".shortcut." in name for name in weights) else "A"
    return ImageConfig("cifar_resnet", {"depth": 6 * per_stage[0] + 2, "shortcut": shortcut,
                                        "channels": weights["conv1.weight"].shape[1],
                                        "classes": weights["linear.weight"].shape[0]})


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder}/model.safetensors cannot be read ({error}); delete it and fetch or save it again")


def _described(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json is not a JSON object ({error}); "
                         f"delete it and fetch or save it again") from error
