"""Image corruptions of weather, cameras and file formats: 15 corruptions, each at severities 1 to 5.

The corruptions are those of Hendrycks and Dietterich 2019 [1]_, with the strengths of CIFAR-10-C.  Constants and rules
follow the authors' ``make_cifar_c.py`` [2]_.  The implementation is our own on numpy, scipy and Pillow, for batches of
images, and needs neither OpenCV nor ImageMagick; each entry documents its departures.  Strengths are in pixels of
32 x 32 images and are the same for other sizes.
Order of this file: execution · noise · blur · weather · digital · mean corruption error · helpers.

References
----------
.. [1] arXiv:1903.12261
.. [2] github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py, commit ca36008
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from scipy import ndimage
from torch import Tensor

from pruning_lib._extras import extra
from pruning_lib._registry import Table

with extra("vision"):
    from PIL import Image

CORRUPTIONS: Table = Table("corruption")
SEVERITIES = (1, 2, 3, 4, 5)
BLOCK = 500  # images corrupted together; each block has its own generator


def corrupt(name: str, images: Tensor, *, severity: int, seed: int = 0) -> Tensor:
    """Return corrupted images; the noise of an image depends on the seed and its position only.

    Parameters
    ----------
    name : key of ``CORRUPTIONS``
    images : (N, 1 or 3, size, size) uint8 pixels
    severity : 1 to 5

    Returns
    -------
    uint8, of the same shape

    Raises
    ------
    ValueError
        for another severity, or images other than square uint8 images of 1 or 3 channels.
    """
    change = CORRUPTIONS[name]
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity}; allowed: 1 to 5")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) \
            or images.shape[2] != images.shape[3]:
        raise ValueError(f"images are {images.dtype}, {tuple(images.shape)}; give uint8 pixels (N, 1 or 3, size, size)")
    done = []
    for i, block in enumerate(images.split(BLOCK)):
        x = block.permute(0, 2, 3, 1).numpy() / 255  # (B, height, width, channels)
        changed = change(x, np.random.default_rng([seed, severity, i]), severity)
        done.append(torch.from_numpy((np.clip(changed, 0, 1) * 255 + 1e-6).astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(done) if done else images.clone()


def _entry(kind: str, *strengths: Any) -> Callable:
    """Return a decorator that registers ``f(x, rng, strength)``, one of ``strengths`` per severity."""
    def enter(f: Callable) -> Callable:
        def change(x: np.ndarray, rng: Generator, severity: int) -> np.ndarray:
            return f(x, rng, strengths[severity - 1])

        change.__doc__ = f.__doc__
        return CORRUPTIONS.register(f.__name__, kind=kind, strengths=strengths)(change)
    return enter


# --- noise ------------------------------------------------------------------------------------------------------------


@_entry("noise", .04, .06, .08, .09, .10)
def gaussian_noise(x: np.ndarray, rng: Generator, deviation: float) -> np.ndarray:
    return x + rng.normal(size=x.shape, scale=deviation)


@_entry("noise", 500, 250, 100, 75, 50)
def shot_noise(x: np.ndarray, rng: Generator, photons: float) -> np.ndarray:
    """Add Poisson noise; ``photons`` is the mean count of a white pixel."""
    return rng.poisson(x * photons) / photons


@_entry("noise", .01, .02, .03, .05, .07)
def impulse_noise(x: np.ndarray, rng: Generator, share: float) -> np.ndarray:
    """Set a share of all values to 0 or 1 with equal probability."""
    hit, white = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, white, x)


# --- blur -------------------------------------------------------------------------------------------------------------


@_entry("blur", (.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))
def defocus_blur(x: np.ndarray, rng: Generator, strength: tuple[float, float]) -> np.ndarray:
    """Blur with a disk of a given radius, its edge softened by a 3 x 3 Gaussian."""
    radius, deviation = strength
    rows, columns = np.mgrid[-8:9, -8:9]
    disk = (rows ** 2 + columns ** 2 <= radius ** 2).astype(float)
    soft = np.exp(-np.array([1, 0, 1]) / (2 * deviation ** 2))
    soft /= soft.sum()
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(soft, soft), mode="constant")
    return ndimage.convolve(x, kernel[None, :, :, None], mode="mirror")


@_entry("blur", (.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))
def glass_blur(x: np.ndarray, rng: Generator, strength: tuple[float, int, int]) -> np.ndarray:
    """Blur, replace pixels by a neighbour up to ``reach`` away, blur again.

    The authors' code intends to swap the two pixels but overwrites the first before reading it.  CIFAR-10-C was made
    with this behaviour, so it is kept.
    """
    deviation, reach, times = strength
    x = np.floor(_gaussian(x, deviation) * 255)
    B, size = len(x), x.shape[1]
    all_images = np.arange(B)
    for _ in range(times):
        for h in range(size - reach, reach, -1):
            for w in range(size - reach, reach, -1):
                dw, dh = rng.integers(-reach, reach, size=(2, B))
                x[:, h, w] = x[all_images, h + dh, w + dw]
    return _gaussian(x / 255, deviation)


@_entry("blur", (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
def motion_blur(x: np.ndarray, rng: Generator, strength: tuple[int, float]) -> np.ndarray:
    """Blur along a line at up to 45 degrees from the horizontal with ImageMagick's kernel, and round to grey levels."""
    return np.round(_along(x, *strength, rng.uniform(-45, 45, len(x))) * 255) / 255


@_entry("blur", 7, 12, 16, 21, 26)
def zoom_blur(x: np.ndarray, rng: Generator, count: int) -> np.ndarray:
    """Average the image and ``count`` zooms of it, by 1.00, 1.01, 1.02 ...

    The authors write ``np.arange(1, 1.06, 0.01)``, which has seven numbers instead of six because of rounding.
    """
    return (x + sum(_zoomed(x, 1 + i / 100) for i in range(count))) / (count + 1)


# --- weather ----------------------------------------------------------------------------------------------------------


@_entry("weather", (.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
        (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))
def snow(x: np.ndarray, rng: Generator, strength: tuple[float, ...]) -> np.ndarray:
    """Add snowflakes to a whitened image: noise, zoomed, thresholded and blurred along the direction of fall."""
    mean, deviation, zoom, threshold, radius, sigma, kept = strength
    flakes = _zoomed(rng.normal(mean, deviation, x.shape[:3])[..., None], zoom)
    flakes = np.floor(np.where(flakes < threshold, 0, flakes).clip(0, 1) * 255) / 255
    flakes = np.round(_along(flakes, int(radius), sigma, rng.uniform(-135, -45, len(x))) * 255) / 255
    whitened = kept * x + (1 - kept) * np.maximum(x, _grey(x) * 1.5 + 0.5)
    return whitened + flakes + np.rot90(flakes, 2, axes=(1, 2))


@_entry("weather", (1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))
def frost(x: np.ndarray, rng: Generator, strength: tuple[float, float]) -> np.ndarray:
    """Mix the image with drawn frost; the authors mix in photographs, so results are not comparable.

    Needles follow from the smallest distance to a few random lines; coarse noise fills the space between them.
    """
    size, lines = x.shape[1], 6
    grid = np.mgrid[0:size, 0:size] / size  # (2, height, width)
    angle, offset = rng.uniform(0, np.pi, (len(x), lines)), rng.uniform(-0.7, 1.2, (len(x), lines))
    across = (np.cos(angle)[..., None, None] * grid[0] + np.sin(angle)[..., None, None] * grid[1]
              - offset[..., None, None])
    needles = np.exp(-np.abs(across).min(1) * 12)
    hoar = ndimage.gaussian_filter(rng.random((len(x), size, size)), (0, size / 16, size / 16), mode="wrap")
    drawn = (0.6 * needles + 0.8 * hoar).clip(0, 1)[..., None]
    return strength[0] * x + strength[1] * drawn


@_entry("weather", (.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))
def fog(x: np.ndarray, rng: Generator, strength: tuple[float, float]) -> np.ndarray:
    """Add clouds of the diamond-square algorithm and keep the brightness of the brightest pixel."""
    amount, decay = strength
    size, brightest = x.shape[1], x.max((1, 2, 3), keepdims=True)
    clouds = _clouds(len(x), 2 ** math.ceil(math.log2(size)), decay, rng)[:, :size, :size, None]
    return (x + amount * clouds) * brightest / (brightest + amount)


@_entry("weather", .05, .1, .15, .2, .3)
def brightness(x: np.ndarray, rng: Generator, added: float) -> np.ndarray:
    """Raise the value in HSV space; at constant hue and saturation this scales the channels of a pixel."""
    value = x.max(3, keepdims=True)
    brighter = (value + added).clip(0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


# --- digital ----------------------------------------------------------------------------------------------------------


@_entry("digital", .75, .5, .4, .3, .15)
def contrast(x: np.ndarray, rng: Generator, share: float) -> np.ndarray:
    """Scale the distance of every pixel to the mean of its channel by ``share``."""
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * share + mean


@_entry("digital", (0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03))
def elastic_transform(x: np.ndarray, rng: Generator, strength: tuple[float, float, float]) -> np.ndarray:
    """Apply a random affine map, then a random smooth displacement; strengths are in shares of the width."""
    size = x.shape[1]
    amount, smooth, reach = (size * s for s in strength)
    return np.stack([_displaced(_affine(image, reach, rng), amount, smooth, rng) for image in x])


@_entry("digital", .95, .9, .85, .75, .65)
def pixelate(x: np.ndarray, rng: Generator, share: float) -> np.ndarray:
    """Reduce the resolution and restore it, with box averages both ways."""
    size = x.shape[1]
    small = int(size * share)
    return _by_pillow(x, lambda picture: picture.resize((small,) * 2, Image.Resampling.BOX).resize(
        (size,) * 2, Image.Resampling.BOX))


@_entry("digital", 80, 65, 58, 50, 40)
def jpeg_compression(x: np.ndarray, rng: Generator, quality: int) -> np.ndarray:
    def through(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(x, through)


# --- mean corruption error --------------------------------------------------------------------------------------------


def mean_corruption_error(errors: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]) -> float:
    """Return the mean corruption error of a network relative to a reference network.

    For each corruption the errors are summed over severities and divided by those of the reference; the ratios are
    averaged.  1 equals the reference; lower is better.  The authors' reference is AlexNet, ours is the dense network.

    Parameters
    ----------
    errors, reference : corruption -> error rate at each severity; the same keys and severities for both

    Raises
    ------
    ValueError
        if corruptions or severities differ, or the reference makes no error on a corruption.
    """
    if {name: len(e) for name, e in errors.items()} != {name: len(e) for name, e in reference.items()} or not errors:
        raise ValueError("both networks need the same corruptions at the same severities")
    faultless = [name for name, found in reference.items() if not sum(found)]
    if faultless:
        raise ValueError(f"the reference makes no error on {', '.join(faultless)}, so the ratio is undefined; "
                         f"leave these corruptions out")
    return float(np.mean([sum(errors[name]) / sum(reference[name]) for name in errors]))


# --- helpers ----------------------------------------------------------------------------------------------------------


def _gaussian(x: np.ndarray, deviation: float) -> np.ndarray:
    """Blur as scikit-image's ``gaussian``: truncated at 4 deviations, border values repeated."""
    return ndimage.gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest", truncate=4)


def _grey(x: np.ndarray) -> np.ndarray:
    return x if x.shape[3] == 1 else (x @ np.array([.299, .587, .114]))[..., None]


def _along(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """Apply ImageMagick's motion blur: half a Gaussian of 2 radius + 1 pixels along one line per image."""
    weights = np.exp(-np.arange(2 * radius + 1) ** 2 / (2 * sigma ** 2))
    size, images = x.shape[1], np.arange(len(x))[:, None, None]
    angle, total = np.deg2rad(degrees)[:, None, None], np.zeros_like(x)
    for i, weight in enumerate(weights / weights.sum()):
        rows = np.arange(size)[:, None] + np.ceil(i * np.sin(angle) - 0.5).astype(int)
        columns = np.arange(size) + np.ceil(i * np.cos(angle) - 0.5).astype(int)
        total += weight * x[images, rows.clip(0, size - 1), columns.clip(0, size - 1)]
    return total


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """Return the zoomed centre of each image at the size of the image."""
    size = x.shape[1]
    cut = math.ceil(size / factor)
    top = (size - cut) // 2
    rows = ndimage.zoom(np.eye(cut), (factor, 1), order=1)  # (zoomed, cut): zooming is linear and separable
    start = (len(rows) - size) // 2
    rows = rows[start:start + size]
    return np.einsum("hi,nijc,wj->nhwc", rows, x[:, top:top + cut, top:top + cut], rows, optimize=True)


def _clouds(count: int, size: int, decay: float, rng: Generator) -> np.ndarray:
    """Return periodic height maps in [0, 1] of the diamond-square algorithm; ``size`` is a power of two."""
    heights, step, wobble = np.zeros((count, size, size)), size, 100.0

    def near(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, 1)
        heights[:, half::step, half::step] = near(pairs + np.roll(pairs, -1, 2))
        middles, corners = heights[:, half::step, half::step], heights[:, ::step, ::step]
        heights[:, ::step, half::step] = near(middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 2))
        heights[:, half::step, ::step] = near(middles + np.roll(middles, 1, 2) + corners + np.roll(corners, -1, 1))
        step, wobble = half, wobble / decay
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


def _affine(image: np.ndarray, reach: float, rng: Generator) -> np.ndarray:
    """Apply the affine map that moves three points by up to ``reach`` pixels, with linear interpolation."""
    middle, arm = len(image) // 2, len(image) // 3
    points = np.array([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]], float)
    moved = points + rng.uniform(-reach, reach, points.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # (3, 2): from output to input coordinates
    rows, columns = np.mgrid[0:len(image), 0:len(image)]
    x, y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], -1) @ back, -1, 0)
    return _sampled(image, y, x, "mirror")


def _displaced(image: np.ndarray, amount: float, smooth: float, rng: Generator) -> np.ndarray:
    dx, dy = (amount * ndimage.gaussian_filter(rng.uniform(-1, 1, image.shape[:2]), smooth, mode="reflect", truncate=3)
              for _ in range(2))
    rows, columns = np.mgrid[0:len(image), 0:len(image)]
    return _sampled(image, rows + dy, columns + dx, "reflect")


def _sampled(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    return np.stack([ndimage.map_coordinates(channel, (rows, columns), order=1, mode=mode)
                     for channel in np.moveaxis(image, -1, 0)], -1)


def _by_pillow(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    pictures = (x * 255).round().astype(np.uint8)
    pictures = pictures[..., 0] if x.shape[3] == 1 else pictures
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
    return changed.reshape(x.shape) / 255
