"""Images by name: pixels and labels in a fixed order, decoded once.

CIFAR-10 is read through torchvision, or from parquet files under ``PRUNING_DATA``, as on the hub; both give one order
of the images, so that a split and the first n images are the same from either source.  The digits are part of
scikit-learn and need no download.
Every set has three disjoint splits: "calibration" for scores, "train" for training, "test" for reported accuracies.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning_lib._extras import extra
from pruning_lib._files import cache, digest
from pruning_lib._registry import Table

SPLITS = ("calibration", "train", "test")


@dataclass(frozen=True)
class ImageSet:
    """One set of images; ``read(part)`` returns pixels and labels of the publisher's "train" or "test" part."""

    read: Callable[[str], tuple[Tensor, Tensor]]
    calibration: int  # number of images of the training part reserved for calibration
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1] of the training part
    std: tuple[float, ...]
    licence: str


def load(name: str, split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first ``n`` images of a split (all by default) and their classes.

    Returns
    -------
    (N, channels, height, width) uint8 pixels and (N,) int64 classes

    Raises
    ------
    ValueError
        for an unknown name or split, or an ``n`` larger than the split.
    ConnectionError
        when the set is neither on disk nor can be downloaded.
    """
    entry: ImageSet = IMAGES[name]
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
    pixels, labels = entry.read("test" if split == "test" else "train")
    if split != "test":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        chosen = order[:entry.calibration] if split == "calibration" else order[entry.calibration:]
        pixels, labels = pixels[chosen], labels[chosen]
    n = len(labels) if n is None else n
    if not 0 < n <= len(labels):
        raise ValueError(f"n={n} images of {name!r}, {split}; give 1 to {len(labels)}")
    return pixels[:n], labels[:n]


def balanced(labels: Tensor, per_class: int, *, seed: int = 0) -> Tensor:
    """Return the places of ``per_class`` images of every class, drawn with ``seed``, in ascending order.

    Raises
    ------
    ValueError
        when a class has fewer images.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique().tolist():
        found = order[labels[order] == label]
        if len(found) < per_class:
            raise ValueError(f"per_class={per_class}, but class {label} has {len(found)} images; give at most that")
        chosen.append(found[:per_class])
    return torch.cat(chosen).sort().values


def fingerprint(pixels: Tensor) -> str:
    """Return 16 hex digits of the SHA-256 of the pixels; runs with the same fingerprint used the same images."""
    return digest(pixels.contiguous().numpy().tobytes())


def _digits(part: str) -> tuple[Tensor, Tensor]:
    """Read 8 x 8 grey digits; the last 597 of 1,797 are the test part."""
    with extra("vision"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    return (pixels[1200:], labels[1200:]) if part == "test" else (pixels[:1200], labels[:1200])


def _cifar10(part: str) -> tuple[Tensor, Tensor]:
    """Return the original pixels, sorted by digest: copies of this set differ in their order."""
    pixels, labels = _copy("cifar10", part) or _torchvision_cifar10(part)
    digests = [digest(image.tobytes(), 64) for image in pixels.numpy()]
    order = torch.tensor(sorted(range(len(digests)), key=digests.__getitem__))
    return pixels[order], labels[order]


def _copy(folder: str, part: str) -> tuple[Tensor, Tensor] | None:
    """Return a data set as ``PRUNING_DATA`` holds it; None where it holds nothing."""
    local = Path(os.environ.get("PRUNING_DATA", "")) / folder / "data"
    return _parquet(local, part) if os.environ.get("PRUNING_DATA") and local.is_dir() else None


def _torchvision_cifar10(part: str) -> tuple[Tensor, Tensor]:
    with extra("vision"):
        from torchvision.datasets import CIFAR10

    folder = cache() / "cifar10"
    try:
        found: Any = CIFAR10(str(folder), train=part == "train", download=not (folder / CIFAR10.base_folder).is_dir())
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"CIFAR-10 is not available: {error}\nGo online once, put the publisher's archive in "
                              f"{folder}, or use the set 'digits', which comes with scikit-learn") from error
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def _parquet(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    with extra("vision"):
        import pandas as pd

    files = sorted(folder.glob(f"{part}-*.parquet"))
    if not files:
        raise ValueError(f"{folder} has no {part}-*.parquet")
    table = pd.concat(map(pd.read_parquet, files))
    images = np.stack([_decoded(cell["bytes"]) for cell in table["img"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_numpy())


def _decoded(content: bytes) -> np.ndarray:
    """Return the (height, width, 3) pixels of a PNG, WebP or JPEG file."""
    with extra("vision"):
        from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


IMAGES: Table = Table("image set")
IMAGES["digits"] = ImageSet(_digits, 300, (0.306,), (0.375,), "CC BY 4.0")
IMAGES["cifar10"] = ImageSet(_cifar10, 5000, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "unspecified")
