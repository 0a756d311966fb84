"""Fine-tuning of pruned image networks: batch-norm statistics only, or all weights by SGD.

Order of this file: recalibrate_batchnorm · train · augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.data import labelled_images
from pruning_lib.models.hooks import evaluating
from pruning_lib.models.loading import FORMATS


def recalibrate_batchnorm(model: nn.Module, images: Any, *, images_per_batch: int = 256) -> nn.Module:
    """Recompute mean and variance of every batch norm in place; no weight is trained.

    After a block is removed, the stored statistics of the layers behind it belong to another input.

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels or floats in [0, 1]; not the test images

    Raises
    ------
    ValueError
        for a network without batch norms, or batches of fewer than 2 images, which have no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not isinstance(images, Tensor):
        images = torch.cat([batch for batch, _ in labelled_images.labelled_batches(images)])
    if not norms:
        raise ValueError(f"this {type(model).__name__} has no batch norm to recalibrate")
    if min(len(images), images_per_batch) < 2:
        raise ValueError(f"{len(images)} images in batches of {images_per_batch}; give at least 2 images per batch")
    _validate_pixels(model, images)
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


def train(model: nn.Module, images: Any, labels: Any = None, *, epochs: float, seed: int, lr: float = 0.01,
          images_per_batch: int = 128, momentum: float = 0.9, weight_decay: float = 5e-4, augment: bool = True,
          dtype: str = "bfloat16", progress: bool = True) -> nn.Module:
    """Train all weights by SGD with Nesterov momentum, in place, with a cosine schedule of the learning rate.

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels, or floats as the network takes them; or a data set, a DataLoader
        or batches of them with their labels
    labels : (N,) class of each image
    epochs : passes over the images; fractions are allowed
    seed : seed of the order of the images, shifts, flips, and dropout
    augment : random shifts by up to an eighth of the width, and random horizontal flips
    dtype : dtype of the multiplications; weights keep the dtype of the model

    Raises
    ------
    ValueError
        for a language model; when the numbers of images and labels differ; when the loss is not finite (lower ``lr``).
    """
    if hasattr(model, "get_input_embeddings"):
        raise ValueError(f"{type(model).__name__} is a language model and cannot be tuned on images; lora.tune "
                         f"tunes it on text, and the notebooks amp_prune and recipe prune it")
    images, labels = labelled_images.whole(images, labels)
    _validate_pixels(model, images)
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(FORMATS)}")
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
                with torch.autocast(device.type, FORMATS[dtype], enabled=dtype != "float32"):
                    logits = model(batch)
                    labelled_images.refuse_logits(logits, labels[chosen])
                    loss = F.cross_entropy(logits.float(), labels[chosen].to(device))
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
    """Return the images shifted at random by up to an eighth of their width, padded black, and half of them flipped.

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


def _validate_pixels(model: nn.Module, images: Tensor) -> None:
    labelled_images.inputs_for(model, images if images.is_floating_point() else images[:1])


def pixels(images: Tensor) -> Tensor:
    """Convert uint8 pixels to floats in [0, 1]; floats are returned unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


@contextmanager
def dropout_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, the only ones dropout can use, and restore them after the ``with`` block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _shuffled(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the numbers of the images of each batch: every image once per epoch, except for an incomplete batch."""
    while True:
        for chosen in torch.randperm(n, generator=generator).split(size):
            if len(chosen) == size:
                yield chosen
