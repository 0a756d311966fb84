"""The residual networks for small images of He et al. 2015 [1]_, section 4.2: 6n + 2 layers in three stages.

A ``CifarResNet`` is a convolution, three stages of n blocks, and a dense layer; a ``Block`` adds two convolutions of
its input to a shortcut.  The first block of the second and the third stage halves width and height and doubles the
channels, so its shortcut changes the shape.  The shortcut of every other block is the identity, and the block can be
removed.

The input is pixels in [0, 1].  The normalisation is a layer of the network, so that perturbations (of an attack, for
example) are measured in pixels for every network.

.. [1] K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition. arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("A", "projection")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per channel, of pixels in [0, 1]


class Normalise(nn.Module):
    """Normalisation of pixels in [0, 1] to mean 0 and standard deviation 1 per channel.

    Mean and standard deviation are part of the config, not of the weights: they are not in the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: give one of each per channel, every std above 0")
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std  # (B, channels, height, width)


class PaddedSubsample(nn.Module):
    """Shortcut "A": every second pixel, padded with channels of zeros, half in front and half behind."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        before = (channels_out - channels_in) // 2
        self.padding = (before, channels_out - channels_in - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.padding))


def projection(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return shortcut "projection" (B in the paper): a 1x1 convolution with stride 2 and batch norm."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out))


class Block(nn.Module):
    """A basic block: relu(shortcut(x) + two 3x3 convolutions of x)."""

    def __init__(self, channels_in: int, channels_out: int, shortcut: str) -> None:
        super().__init__()
        keeps_shape = channels_in == channels_out
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=1 if keeps_shape else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        change = PaddedSubsample if shortcut == "A" else projection
        self.shortcut = nn.Identity() if keeps_shape else change(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(self.shortcut(x) + branch)


class CifarResNet(nn.Module):
    """Three stages of ``(depth - 2) / 6`` basic blocks with 16, 32 and 64 channels.

    Parameters
    ----------
    depth : layers with weights, 6n + 2; the paper has 20, 32, 44, 56 and 110
    shortcut : where the shape changes, ``"A"`` (no parameters) or ``"projection"`` (1x1 convolution and batch norm)
    channels : channels of the images, 3 for colour and 1 for grey
    classes : number of outputs
    mean, std : mean and standard deviation of pixels in [0, 1], per channel

    Raises
    ------
    ValueError
        for a depth that is not 6n + 2, an unknown shortcut, or a mean without one value per channel.
    """

    def __init__(self, depth: int = 56, shortcut: str = "A", channels: int = 3, classes: int = 10,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if n < 1 or rest:
            raise ValueError(f"depth={depth}; a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, 26, 32, 38, 44, 50, 56, ...")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut={shortcut!r}; allowed: {', '.join(SHORTCUTS)}")
        if len(mean) != channels:
            raise ValueError(f"{channels} channels but a mean of {len(mean)}; give mean and std one value per channel")
        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(n, 16, 16, shortcut)
        self.layer2 = _stage(n, 16, 32, shortcut)
        self.layer3 = _stage(n, 32, 64, shortcut)
        self.linear = nn.Linear(64, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalise(pixels))))  # (B, 16, height, width)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64, height / 4, width / 4)
        return self.linear(x.mean((2, 3)))  # (B, classes)


def _stage(blocks: int, channels_in: int, channels_out: int, shortcut: str) -> nn.Sequential:
    """Return a stage of blocks; the first changes the number of channels, the others keep it."""
    first = Block(channels_in, channels_out, shortcut)
    return nn.Sequential(first, *(Block(channels_out, channels_out, shortcut) for _ in range(blocks - 1)))
