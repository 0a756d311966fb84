"""The residual networks for CIFAR-10 as Keras builds them: those that the Consensus and CKA papers published.

The architecture is He et al.'s [1]_ with shortcut B, in the form of Keras' own example.  It differs from
``cifar_resnet`` in five ways, each of which changes the output: convolutions have biases; batch norms add 1e-3 to the
variance; a stride-2 convolution pads on the right and below only ("same" padding of an even size); the shortcut of a
block that changes the shape is a convolution with bias and without batch norm; and inputs are pixels less the mean of
each pixel over the training images, with no division.

References
----------
.. [1] K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition. arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)  # channels of the three stages
EPSILON = 1e-3  # Keras' default; PyTorch's is 1e-5


class PixelMean(nn.Module):
    """Subtract the mean of every pixel of every channel; it is part of the weights, unlike ``Normalise``.

    Attributes
    ----------
    mean : (channels, size, size), of pixels in [0, 1] of the training images
    """

    mean: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, size, size))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels - self.mean


class SameConv2d(nn.Conv2d):
    """Convolve with bias as Keras does with ``padding="same"``: where the padding is odd, more of it is behind."""

    def __init__(self, channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, size, stride=stride, padding=size // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):  # an odd kernel pads the same on all sides
            return super().forward(x)
        return super().forward(F.pad(x, (*self._padding_of(x.shape[3], 1), *self._padding_of(x.shape[2], 0))))

    def _padding_of(self, size: int, axis: int) -> tuple[int, int]:
        """Return the padding before and behind along one axis of ``size`` pixels."""
        stride, kernel = self.stride[axis], self.kernel_size[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class KerasBlock(nn.Module):
    """A basic block: relu(shortcut(x) + two 3x3 convolutions of x)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        keeps_shape = channels_in == channels_out
        self.conv1 = SameConv2d(channels_in, channels_out, stride=1 if keeps_shape else 2)
        self.bn1 = nn.BatchNorm2d(channels_out, eps=EPSILON)
        self.conv2 = SameConv2d(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out, eps=EPSILON)
        self.shortcut = nn.Identity() if keeps_shape else SameConv2d(channels_in, channels_out, size=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(self.shortcut(x) + branch)


class KerasResNet(nn.Module):
    """Three stages of basic blocks with 16, 32 and 64 channels, on pixels in [0, 1].

    Parameters
    ----------
    blocks : of each stage; (9, 9, 9) is ResNet-56
    channels : of the images, 3 for colour and 1 for grey
    classes : number of outputs
    size : width and height of the images, which the mean per pixel fixes

    Raises
    ------
    ValueError
        for other than three stages, a stage without blocks, or sizes below 1.
    """

    def __init__(self, blocks: Sequence[int] = (9, 9, 9), channels: int = 3, classes: int = 10, size: int = 32) -> None:
        super().__init__()
        if len(blocks) != 3 or min(blocks) < 1:
            raise ValueError(f"blocks={tuple(blocks)}; give three numbers of at least 1, such as (9, 9, 9)")
        if min(channels, classes, size) < 1:
            raise ValueError(f"channels={channels}, classes={classes}, size={size}; give numbers of at least 1")
        self.pixel_mean = PixelMean(channels, size)
        self.conv1 = SameConv2d(channels, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], eps=EPSILON)
        self.layer1 = _stage(blocks[0], WIDTHS[0], WIDTHS[0])
        self.layer2 = _stage(blocks[1], WIDTHS[0], WIDTHS[1])
        self.layer3 = _stage(blocks[2], WIDTHS[1], WIDTHS[2])
        self.linear = nn.Linear(WIDTHS[2], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.pixel_mean(pixels))))  # (B, 16, height, width)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64, height / 4, width / 4)
        return self.linear(x.mean((2, 3)))  # (B, classes)


def blocks_of(weights: dict[str, Tensor]) -> tuple[int, ...]:
    """Return the number of blocks in each stage of the network that these weights are of."""
    return tuple(len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")})
                 for stage in (1, 2, 3))


def _stage(blocks: int, channels_in: int, channels_out: int) -> nn.Sequential:
    """Return the blocks of one stage; the first one may change the shape."""
    first = KerasBlock(channels_in, channels_out)
    return nn.Sequential(first, *(KerasBlock(channels_out, channels_out) for _ in range(blocks - 1)))
