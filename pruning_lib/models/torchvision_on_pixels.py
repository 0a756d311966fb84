"""torchvision networks that normalise their input, pixels in [0, 1]; the names of the weights are torchvision's."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import ResNet

from pruning_lib.models.cifar_resnet import Normalise


class _OnPixels:
    """Normalise the input of the torchvision network that follows in the order of classes."""

    normalise: Normalise

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(self.normalise(pixels))  # type: ignore[misc]


class ResNetOnPixels(_OnPixels, ResNet):
    pass


class MobileNetV2OnPixels(_OnPixels, MobileNetV2):
    pass
