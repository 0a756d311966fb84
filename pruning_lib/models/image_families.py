"""Image networks built by name: where their residual blocks and classifiers are.

All other image networks need no record: ``residual_blocks.find`` finds their blocks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import cast

from torch import nn

from pruning_lib._registry import Table
from pruning_lib.models.residual_blocks import BlockInfo


@dataclass(frozen=True)
class ImageFamily:
    """Module paths of the residual blocks in one family of image networks."""

    network: str  # path of its class; torchvision's are looked up only when a model comes, for it may not be installed
    block: tuple[str, ...]  # classes of residual blocks among the members of the sequences
    sequences: tuple[str, ...]  # paths to the sequences of blocks, in forward order
    classifier: str  # the layer that maps features (N, P) to classes


IMAGE_FAMILIES: Table = Table("image family")
IMAGE_FAMILIES["cifar_resnet"] = ImageFamily(
    "pruning_lib.models.cifar_resnet.CifarResNet", ("pruning_lib.models.cifar_resnet.Block",),
    ("layer1", "layer2", "layer3"), "linear")
IMAGE_FAMILIES["keras_resnet"] = ImageFamily(
    "pruning_lib.models.keras_resnet.KerasResNet", ("pruning_lib.models.keras_resnet.KerasBlock",),
    ("layer1", "layer2", "layer3"), "linear")
IMAGE_FAMILIES["torchvision_resnet"] = ImageFamily(
    "pruning_lib.models.torchvision_networks.ResNetOnPixels",
    ("torchvision.models.resnet.BasicBlock", "torchvision.models.resnet.Bottleneck"),
    ("layer1", "layer2", "layer3", "layer4"), "fc")
IMAGE_FAMILIES["mobilenet_v2"] = ImageFamily(
    "pruning_lib.models.torchvision_networks.MobileNetV2OnPixels",
    ("torchvision.models.mobilenetv2.InvertedResidual",), ("features",), "classifier.1")


def image_family(model: nn.Module) -> ImageFamily | None:
    """Return the record of an image network, found by its class; None for any other model."""
    return next((family for family in IMAGE_FAMILIES.values() if _is_a(model, family.network)), None)


def _is_a(module: nn.Module, path: str) -> bool:
    """Return whether ``module`` is an instance of the class at ``path``; False while that was never imported."""
    home, _, name = path.rpartition(".")
    return home in sys.modules and isinstance(module, getattr(sys.modules[home], name))


def is_image_network(model: nn.Module) -> bool:
    """Return True for an image network; language models are those with the methods of transformers."""
    return image_family(model) is not None or not hasattr(model, "get_output_embeddings")


def image_blocks(model: nn.Module) -> list[BlockInfo]:
    """Return the residual blocks of an image network; every block that changes the shape begins a stage."""
    family = cast(ImageFamily, image_family(model))
    found: list[BlockInfo] = []
    for sequence in family.sequences:
        for i, block in enumerate(cast(nn.Sequential, model.get_submodule(sequence))):
            if any(_is_a(block, name) for name in family.block):
                keeps = keeps_shape(block)
                stage = found[-1].stage + (not keeps) if found else 0
                found.append(BlockInfo(f"{sequence}.{i}", stage, keeps))
    return found


def keeps_shape(block: nn.Module) -> bool:
    """Return True if the output of a residual block has the shape of its input, judged by the block's convolutions.

    The convolutions are in forward order; a shortcut with its own convolution comes last and has as many output
    channels as the branch.
    """
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    same_channels = convolutions[0].in_channels == convolutions[-1].out_channels
    return same_channels and all(convolution.stride == (1, 1) for convolution in convolutions)
