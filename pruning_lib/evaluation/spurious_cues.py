"""Reliance of a network on a spurious cue, an injected mark that correlates with the class.  Our own protocol.

During training, every image carries a cue that encodes its class correctly with a given probability.  The
network is then tested on images without a cue, with the cue of their class (bias-aligned) and with the cue
of another class (bias-conflicting).  A network that classifies by the object has the same accuracy on
all three; a network that relies on the cue follows it.

*Rule* of the verdict "no shortcut learning", written before networks were trained with a cue from the start:

1. Units are training seeds.  Each has a dense network and the pruned ones, trained on the same marked images equally
   long, and there are at least three.
2. *Positive control*: the dense network of every seed relies on the cue by at least ``BITES``; else the control does
   not bite, and the verdict is *not run*.
3. *Measure*: reliance of the pruned minus that of the dense network of the same seed, its mean over seeds and a 95 % t
   interval.  A difference matters from ``SMALLEST`` on.
4. *Reproduced* if the pruned networks' mean reliance is below ``SMALLEST``: they do not follow a cue that the dense
   ones follow.  Else *partly* if they rely less, *contradicted* if they rely more, by at least ``SMALLEST`` and with an
   interval on that side of 0.  Else *contradicted*: they follow the cue as the dense ones do.
5. The difference in accuracy without a cue stands beside it; above ``UNEQUAL`` the networks are not equally good.

Order of this file: cues · injection · reliance · verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pruning_lib._registry import Table
from pruning_lib.data import labelled_images

BITES, SMALLEST, UNEQUAL = 0.20, 0.05, 0.02  # reliance of a control that bites, and differences that matter
CUES: Table = Table("cue")
TESTS = ("absent", "bias_aligned", "bias_conflicting")


@CUES.register(about="a white square whose place along the upper, then the lower edge tells the class")
def patch(images: Tensor, code: Tensor) -> Tensor:
    side = max(1, images.shape[-1] // 8)
    per_row = images.shape[-1] // side
    if code.numel() and code.max() >= 2 * per_row:
        raise ValueError(f"class {code.max()} has no position; a patch can encode {2 * per_row} classes")
    marked = images.clone()
    for image, place in zip(marked, code.tolist(), strict=True):
        top, left = (0 if place < per_row else image.shape[-2] - side), place % per_row * side
        image[:, top:top + side, left:left + side] = 255
    return marked


@CUES.register(about="a tenth of a colour, or of a brightness for grey images, that tells the class")
def tint(images: Tensor, code: Tensor) -> Tensor:
    if code.numel() and code.max() > 9:
        raise ValueError(f"class {code.max()} has no colour; a tint can encode 10 classes")
    angle = 2 * torch.pi * code.double()[:, None] / 10
    phase = torch.tensor([0, 2, 4])[:images.shape[1]] * torch.pi / 3  # red, green and blue a third of a turn apart
    colour = 127.5 * (1 + torch.cos(angle - phase)) if images.shape[1] == 3 else 255 * code.double()[:, None] / 9
    return (0.9 * images + 0.1 * colour[..., None, None]).round().byte()


def inject_cue(images: Tensor, labels: Tensor, *, cue: str, agreement: float, seed: int, classes: int = 10) -> Tensor:
    """Return images with a cue of their class with probability ``agreement``, else of a random other class.

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels
    labels : (N,) classes
    cue : key of ``CUES``
    agreement : 0 for bias-conflicting only, 1 / classes for an uninformative cue, 1 for bias-aligned only

    Raises
    ------
    ValueError
        for an unknown cue, a probability outside 0 to 1, images that are not uint8, missing labels, labels outside
        of the classes, or more classes than the cue can encode.
    """
    mark: Callable[[Tensor, Tensor], Tensor] = CUES[cue]
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement={agreement}; give a probability from 0 to 1")
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; give uint8 pixels")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {tuple(images.shape)}; give (N, 1 or 3, height, width)")
    labels = labelled_images.class_numbers(labels)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give one label per image")
    if classes < 2 or (labels.numel() and not 0 <= labels.min() <= labels.max() < classes):
        raise ValueError(f"classes={classes}, labels from {labels.min()} to {labels.max()}; give at least 2 classes "
                         f"and labels below their number")
    generator = torch.Generator().manual_seed(seed)
    agrees = torch.rand(len(labels), generator=generator) < agreement
    other = (labels + torch.randint(1, classes, (len(labels),), generator=generator)) % classes
    return mark(images, torch.where(agrees, labels, other))


def trials(images: Tensor, labels: Tensor, *, cue: str, seed: int, classes: int = 10) -> dict[str, Tensor]:
    """Return the test images without a cue, bias-aligned and bias-conflicting."""
    return {"absent": images, **{name: inject_cue(images, labels, cue=cue, agreement=agreement, seed=seed,
                                                     classes=classes)
                                 for name, agreement in zip(TESTS[1:], (1.0, 0.0), strict=True)}}


def reliance(aligned: np.ndarray, conflicting: np.ndarray) -> dict[str, float]:
    """Return bias-aligned minus bias-conflicting accuracy: 0 for no reliance on the cue, 1 for complete reliance.

    Parameters
    ----------
    aligned, conflicting : (N,) booleans, correctness on the same images
    """
    return _mean(aligned.astype(float) - conflicting, "reliance")


def difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Return the paired difference in reliance of two networks, each given as (aligned, conflicting)."""
    a, b = (aligned.astype(float) - conflicting for aligned, conflicting in (first, second))
    return _mean(a - b, "difference")


def _mean(values: np.ndarray, name: str) -> dict[str, float]:
    """Return the mean and its 95 % interval (normal)."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} images; give at least 2")
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {f"{name}_fraction": mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def over_seeds(pruned: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Return the mean difference of a quantity over seeds, pruned minus dense, with its 95 % t interval.

    Parameters
    ----------
    pruned, dense : one value per seed, in the same order

    Raises
    ------
    ValueError
        for fewer than two seeds, or not one value each.
    """
    values = np.subtract(pruned, dense)
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds; give at least 2")
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return {"mean_fraction": mean, "low": mean - half, "high": mean + half}


def verdict(pruned: Sequence[float], dense: Sequence[float]) -> str:
    """Return the verdict on "no shortcut learning" by the rule above.

    Parameters
    ----------
    pruned, dense : reliance of the network of each seed
    """
    if len(dense) < 3 or min(dense) < BITES:
        return "not run"
    if np.mean(pruned) < SMALLEST:
        return "reproduced"
    found = over_seeds(pruned, dense)
    return "partly" if found["mean_fraction"] <= -SMALLEST and found["high"] < 0 else "contradicted"
