"""torchvision's networks, as they are but for one thing: they normalise the pixels they are given."""

from __future__ import annotations

from torch import Tensor

from pruning_lib._extras import extra
from pruning_lib.models.cifar_resnet import Normalise

with extra("vision"):
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class _OnPixels:
    """Mixin for a torchvision network that normalises its input; the names of the weights are those of torchvision."""

    normalise: Normalise

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(self.normalise(pixels))  # type: ignore[misc]


class ResNetOnPixels(_OnPixels, ResNet):
    pass


class MobileNetV2OnPixels(_OnPixels, MobileNetV2):
    pass


def resnet18(classes: int) -> ResNet:
    return ResNetOnPixels(BasicBlock, [2, 2, 2, 2], classes)


def resnet34(classes: int) -> ResNet:
    return ResNetOnPixels(BasicBlock, [3, 4, 6, 3], classes)


def resnet50(classes: int) -> ResNet:
    return ResNetOnPixels(Bottleneck, [3, 4, 6, 3], classes)


def resnet101(classes: int) -> ResNet:
    return ResNetOnPixels(Bottleneck, [3, 4, 23, 3], classes)


def mobilenet_v2(classes: int) -> MobileNetV2:
    return MobileNetV2OnPixels(classes)
