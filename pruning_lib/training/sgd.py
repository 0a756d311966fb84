"""Win quality back after a cut: batch-norm statistics alone, or all weights by SGD.

Order of this file: recalibrate_batchnorm · train · augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models.hooks import evaluating

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def recalibrate_batchnorm(model: nn.Module, images: Tensor, *, images_per_batch: int = 256) -> nn.Module:
    """Measure mean and variance of every batch norm anew, in place; no weight is trained.

    After a cut the statistics stored in the layers behind it are those of another input.

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels or floats in [0, 1]; not the test images

    Raises
    ------
    ValueError
        for a network without batch norms, or fewer than 2 images in a batch, which have no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError(f"this {type(model).__name__} has no batch norm to recalibrate")
    if min(len(images), images_per_batch) < 2:
        raise ValueError(f"{len(images)} images in batches of {images_per_batch}; give at least 2 images per batch")
    device, momenta = next(model.parameters()).device, [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        try:
            for batch in images.split(images_per_batch):
                if len(batch) > 1:
                    model(pixels(batch.to(device)))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: float, seed: int, lr: float = 0.01,
          images_per_batch: int = 128, momentum: float = 0.9, weight_decay: float = 5e-4, augment: bool = True,
          dtype: str = "bfloat16", progress: bool = True) -> nn.Module:
    """Train all weights by SGD with Nesterov momentum, in place; the learning rate falls to zero along a cosine.

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels or floats in [0, 1]
    labels : (N,) class of each image
    epochs : passes over the images; fractions are allowed
    seed : order of the images, shifts, flips, and the dropout of the network
    augment : shift by up to an eighth of the width and flip sideways, at random
    dtype : of the multiplications; weights stay in the model's own

    Raises
    ------
    ValueError
        for a language model; when images and labels do not belong together; when the loss is no number any more (lower
        ``lr``).
    """
    if hasattr(model, "get_input_embeddings"):
        raise ValueError(f"{type(model).__name__} is a language model and cannot be tuned on images; recover.lora "
                         f"tunes it on text, and the notebooks amp_prune and recipe prune it")
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give one label per image")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    images_per_batch = min(images_per_batch, len(images))
    steps = round(epochs * len(images) / images_per_batch)
    if steps < 1:
        return model
    device, modes = next(model.parameters()).device, {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = _shuffled(len(images), images_per_batch, generator)
    try:
        with dropout_seeded(seed, device):
            for _ in tqdm(range(steps), desc="training", disable=not progress, leave=False):
                chosen = next(order)
                batch = shifted_and_flipped(images[chosen], generator) if augment else images[chosen]
                batch = pixels(batch.to(device)).contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                    loss = F.cross_entropy(model(batch).float(), labels[chosen].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} after {steps} steps; try a learning rate below {lr}")
    finally:
        for module, training in modes.items():
            module.training = training
    return model


def shifted_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to an eighth of its width in both directions, black coming in, and half of them flipped.

    Parameters
    ----------
    images : (B, channels, height, width)
    """
    B, _, height, width = images.shape
    reach = width // 8
    padded = F.pad(images, (reach,) * 4)
    top, left = torch.randint(2 * reach + 1, (2, B, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (B, height), (B, width)
    flipped = torch.rand(B, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    return padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def pixels(images: Tensor) -> Tensor:
    """Floats in [0, 1] from uint8 pixels; floats stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


@contextmanager
def dropout_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout can draw from the global generators only: seed them, and put them back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _shuffled(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of the images of one batch after the other, every image once per epoch but for a rest too small."""
    while True:
        for chosen in torch.randperm(n, generator=generator).split(size):
            if len(chosen) == size:
                yield chosen
