"""Image networks built by name: where their residual blocks and classifiers are.

All other image networks need no record: ``residual_blocks.find`` finds their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from pruning_lib._registry import Table
from pruning_lib.models.cifar_resnet import Block, CifarResNet
from pruning_lib.models.residual_blocks import BlockInfo
from pruning_lib.models.torchvision_on_pixels import MobileNetV2OnPixels, ResNetOnPixels


@dataclass(frozen=True)
class ImageFamily:
    """Module paths of the residual blocks in one family of image networks."""

    network: type[nn.Module]
    block: tuple[type[nn.Module], ...]  # classes of residual blocks among the members of the sequences
    sequences: tuple[str, ...]  # paths to the sequences of blocks, in forward order
    classifier: str  # the layer that maps features (N, P) to classes


IMAGE_FAMILIES: Table = Table("image family")
IMAGE_FAMILIES["cifar_resnet"] = ImageFamily(CifarResNet, (Block,), ("layer1", "layer2", "layer3"), "linear")
IMAGE_FAMILIES["torchvision_resnet"] = ImageFamily(
    ResNetOnPixels, (BasicBlock, Bottleneck), ("layer1", "layer2", "layer3", "layer4"), "fc")
IMAGE_FAMILIES["mobilenet_v2"] = ImageFamily(MobileNetV2OnPixels, (InvertedResidual,), ("features",), "classifier.1")


def image_family(model: nn.Module) -> ImageFamily | None:
    """Return the record of an image network, found by its class; None for any other model."""
    return next((family for family in IMAGE_FAMILIES.values() if isinstance(model, family.network)), None)


def is_image_network(model: nn.Module) -> bool:
    """Return True for an image network; language models are those with the methods of transformers."""
    return image_family(model) is not None or not hasattr(model, "get_output_embeddings")


def image_blocks(model: nn.Module) -> list[BlockInfo]:
    """Return the residual blocks of an image network; every block that changes the shape begins a stage."""
    family = cast(ImageFamily, image_family(model))
    found: list[BlockInfo] = []
    for sequence in family.sequences:
        for i, block in enumerate(cast(nn.Sequential, model.get_submodule(sequence))):
            if isinstance(block, family.block):
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
