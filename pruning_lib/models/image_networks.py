"""Image networks by name: building, writing to a folder, reading from a folder.

An ``ImageConfig`` describes a network without its weights.  The config of a pruned network names the original network
and the kept blocks; to read it, the original is built without weights, pruned by ``surgery``, and filled.
Every network takes pixels in [0, 1] and contains its normalisation.
Any other network, of torchvision, of timm or of one's own, is pruned and saved as it is; ``describe`` adds the
facts that cannot be found.  To add a network that is built by name, add one function to ``NETWORKS``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruning_lib._files import new_folder
from pruning_lib._registry import Table
from pruning_lib.models import described_networks, families, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD, CifarResNet, Normalise
from pruning_lib.models.described_networks import describe as describe
from pruning_lib.models.keras_resnet import KerasResNet, PixelMean

FORMAT, VERSION = "pruning_lib image network", 1
DESCRIBED = 2  # version of the format of networks that are not in NETWORKS


@dataclass(frozen=True)
class ImageConfig:
    """Description of an image network without its weights.

    Attributes
    ----------
    network : key of ``NETWORKS``
    arguments : arguments of that function; missing ones have their defaults
    mean, std : mean and standard deviation of pixels in [0, 1], one value per channel
    kept_blocks : names, in the original network, of the kept blocks in forward order; None for all blocks
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
    # the normalisation is in the config and is added by ``_normalising``
    return CifarResNet(depth, shortcut, channels, classes, mean=(0.0,) * channels, std=(1.0,) * channels)


@NETWORKS.register()
def keras_resnet(blocks: Sequence[int] = (9, 9, 9), channels: int = 3, classes: int = 10, size: int = 32) -> nn.Module:
    return KerasResNet(blocks, channels, classes, size)


@NETWORKS.register()
def resnet18(classes: int = 1000) -> nn.Module:
    return _torchvision_networks().resnet18(classes)


@NETWORKS.register()
def resnet34(classes: int = 1000) -> nn.Module:
    return _torchvision_networks().resnet34(classes)


@NETWORKS.register()
def resnet50(classes: int = 1000) -> nn.Module:
    return _torchvision_networks().resnet50(classes)


@NETWORKS.register()
def resnet101(classes: int = 1000) -> nn.Module:
    return _torchvision_networks().resnet101(classes)


@NETWORKS.register()
def mobilenet_v2(classes: int = 1000) -> nn.Module:
    return _torchvision_networks().mobilenet_v2(classes)


def _torchvision_networks() -> Any:
    from pruning_lib.models import torchvision_networks  # language models do without torchvision

    return torchvision_networks


def build(config: ImageConfig | str, *, seed: int | torch.Generator) -> nn.Module:
    """Build a network with random weights; its full description is ``network.config``.

    Convolutions are initialised as in He et al. 2015 (arXiv:1502.01852: normal, fan out), the dense layer uniformly
    within 1 / sqrt(inputs) with bias 0, batch norms with scale 1 and shift 0.

    Parameters
    ----------
    config : description of the network, or a key of ``NETWORKS`` for that network with its defaults
    seed : a number or a generator; the global generators are not used

    Raises
    ------
    ValueError
        for an unknown network or argument, blocks that cannot be removed, or a mean of another number of channels.
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
            raise TypeError(f"no rule to initialise {type(module).__name__}; add one to image_networks.build")
    return _normalising(network)


def with_weights(config: ImageConfig, weights: dict[str, Tensor]) -> nn.Module:
    """Build the network of ``config`` with these weights; raise ValueError if they belong to another network."""
    network = _outline(config)
    # cloned: tensors in a file may be unaligned in memory, and kernels may then round differently
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of {config.network} with {config.arguments}: {error}") from error
    network = _normalising(network)
    return network.to(next(network.parameters()).dtype)  # of the normalisation too


def write(network: nn.Module, folder: Path) -> None:
    """Write the weights and the config of a network to ``folder``, as two files.

    Raises
    ------
    ValueError
        for a network that was not built here and that nothing tells how to build again.
    """
    config = getattr(network, "config", None)
    if not isinstance(config, ImageConfig):
        described_networks.write(network, folder, {"format": FORMAT, "format_version": DESCRIBED})
        return
    weights = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    text = json.dumps({"format": FORMAT, "format_version": VERSION, **asdict(config)}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def write_new(network: nn.Module, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a network, and further files (name -> text), into a new ``folder``, whole or not at all."""
    with new_folder(folder) as work:
        write(network, work)
        for name, text in (texts or {}).items():
            (work / name).write_text(text + "\n")


def kind(network: nn.Module) -> str:
    """Return the key of ``NETWORKS`` of a network, or the source of any other one, or the name of its class."""
    config = getattr(network, "config", None)
    source = None if isinstance(config, ImageConfig) else described_networks.description(network).source
    return config.network if isinstance(config, ImageConfig) else str(source or type(network).__name__)


def is_image_network(folder: Path) -> bool:
    """Return True if ``write`` wrote the folder, or if it has the weights of a CIFAR ResNet and no config."""
    if (folder / "config.json").is_file():
        return _described(folder).get("format") == FORMAT
    if not (folder / "model.safetensors").is_file():
        return False
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {"conv1.weight", "layer3.0.conv1.weight", "linear.weight"} <= set(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from error


def read(folder: Path, *, allow_import: Collection[str] = ()) -> nn.Module:
    """Read the network in a folder for which ``is_image_network`` is True.

    Raises
    ------
    ValueError
        for a config of a later version or with unknown values, unreadable weights, or weights of another network.
    """
    weights = _weights(folder)
    if not (folder / "config.json").exists():
        return with_weights(_inferred(weights), weights)
    described = _described(folder)
    version = described.pop("format_version", None)
    if version not in (VERSION, DESCRIBED):
        raise ValueError(f"{folder}/config.json is not of format version {VERSION} or {DESCRIBED}; update pruning_lib")
    del described["format"]
    try:
        if version == DESCRIBED:
            return described_networks.read(described, weights, allow_import=allow_import)
        return with_weights(ImageConfig(**described), weights)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:  # fields or
        # arguments unknown to this format, impossible sizes
        raise ValueError(f"{folder}/config.json does not describe an image network: {error}") from error


def _outline(config: ImageConfig) -> nn.Module:
    """Build the network without weights (on the meta device), with the kept blocks only."""
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
    """Add the normalisation of the config, which is no part of the weights, and return the network for evaluation."""
    network.normalise = Normalise(network.config.mean, network.config.std)
    return network.eval()


def _inferred(weights: dict[str, Tensor]) -> ImageConfig:
    """Return the config of a CIFAR ResNet inferred from its weights; the normalisation is assumed to be ImageNet's."""
    per_stage = [len({name.split(".")[1] for name in weights if name.startswith(f"layer{i}.")}) for i in (1, 2, 3)]
    if len(set(per_stage)) > 1:
        raise ValueError(f"stages of {', '.join(map(str, per_stage))} blocks and no config.json: the original of this "
                         f"pruned network cannot be inferred; write it with checkpoints.save")
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
