"""Correctness of a classifier, image by image: whether the label of an image has the highest score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning_lib.data import labelled_images
from pruning_lib.models.hooks import evaluating


def correct_mask(model: nn.Module, images: Tensor, labels: Tensor, *, images_per_batch: int = 128) -> Tensor:
    """Return (N,) booleans: True where the label of an image has the highest score.

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels, or floats as the network takes them
    labels : (N,) class of each image
    """
    device, labels = next(model.parameters()).device, labelled_images.pair(images, labels)
    found = []
    with torch.no_grad(), evaluating(model):
        for x, y in zip(images.split(images_per_batch), labels.split(images_per_batch), strict=True):
            logits = model(labelled_images.inputs_for(model, x).to(device, memory_format=torch.channels_last))
            labelled_images.refuse_logits(logits, y)
            found.append(logits.argmax(1).cpu() == y)
    return torch.cat(found)
