"""Images and classes in every form people have them, brought to one form or refused with the reason.

All functions that take images or labels pass through here: tensors, a data set such as ImageFolder, a DataLoader, lists
of batches; labels as integers, columns, one-hot rows or floats; pixels as uint8 or floats.
Order of this file: labels · images · logits · batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pruning_lib._extras import extra
from pruning_lib.models.described_networks import takes_pixels

IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "image", "images"), ("labels", "label")  # of batches that are dicts


def class_numbers(labels: Any) -> Tensor:
    """Return labels as (N,) int64 on the CPU.

    Parameters
    ----------
    labels : integers, booleans or floats without fraction, (N,) or (N, 1); or one-hot rows (N, classes)

    Raises
    ------
    ValueError
        for probabilities, fractions, or another shape.
    """
    found = torch.as_tensor(labels).detach().cpu()
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim == 2:
        if not (((found == 0) | (found == 1)).all() and (found.sum(1) == 1).all()):
            raise ValueError(f"labels have shape {tuple(found.shape)} and are not one-hot; give the class of each "
                             f"sample, for probabilities labels.argmax(1)")
        return found.to(torch.int64).argmax(1)
    if found.ndim != 1:
        raise ValueError(f"labels have shape {tuple(found.shape)}; give {len(found) if found.ndim else 'N'} integers, "
                         f"one for each sample")
    if found.is_complex() or found.is_floating_point() and not (found == found.round()).all():
        raise ValueError(f"labels are {found.dtype} with fractions; give integers, the class of each sample")
    return found.to(torch.int64)


def pair(images: Tensor, labels: Any) -> Tensor:
    """Return the classes (N,) of images (N, ...); raise ValueError unless each has one, not below 0."""
    found = class_numbers(labels)
    if len(images) != len(found) or not len(images):
        raise ValueError(f"{len(images)} images and {len(found)} labels; give one label per image")
    if found.min() < 0:
        raise ValueError(f"label {found.min()}; classes are counted from 0")
    return found


def inputs_for(network: nn.Module, images: Tensor) -> Tensor:
    """Return images as the network takes them: uint8 pixels become floats in [0, 1], floats stay as they are.

    Raises
    ------
    ValueError
        for another shape, number of channels or type; for floats outside [0, 1] where the network normalises them
        itself, or of 0 to 255 anywhere; and for uint8 pixels of a torchvision or timm network, which expects normalised
        floats.
    """
    _refuse_shape(network, images)
    plain = takes_pixels(network)
    if images.dtype == torch.uint8:
        library = type(network).__module__.partition(".")[0]
        if not plain and library in ("torchvision", "timm"):
            raise ValueError(f"pixels are uint8, but this {type(network).__name__} of {library} expects normalised "
                             f"floats; give those, or call image_networks.describe(network, mean=..., std=...) once")
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"pixels are {images.dtype}; give uint8, or floats in [0, 1]")
    low, high = (float(value) for value in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low == low and high - low < float("inf")):
        raise ValueError("pixels hold NaN or infinity")
    if plain and (low < -1e-3 or high > 1 + 1e-3) or low >= 0 and high > 30:
        raise ValueError(f"pixels are {images.dtype} from {low:g} to {high:g}; give floats in [0, 1] (divide by 255) "
                         f"or uint8" + (", this network normalises them itself" if plain else ""))
    return images


def _refuse_shape(network: nn.Module, images: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images are {shape}; give a tensor (N, channels, height, width)")
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    spreads = images.shape[1] == 1 and hasattr(network, "normalise")  # grey less a mean per channel has all channels
    if first is not None and images.shape[1] != first.in_channels and not spreads:
        hint = {1: "images.expand(-1, 3, -1, -1)"}.get(images.shape[1], "images.permute(0, 3, 1, 2)"
                                                       if images.shape[3] == first.in_channels else "")
        raise ValueError(f"images have {images.shape[1]} channels, {tuple(images.shape)}, and this "
                         f"{type(network).__name__} takes {first.in_channels}" + (f"; try {hint}" if hint else ""))


def refuse_logits(logits: Any, labels: Tensor | None = None) -> None:
    """Raise ValueError unless the output of a network is (N, classes) logits with a class for every label."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network returns {given}; wrap it in a module that returns logits (N, classes)")
    if logits.shape[1] < 2:
        raise ValueError("the network returns one number per image; give it one output per class, for two classes "
                         "torch.cat([-x, x], 1) / 2 of that number x")
    if labels is not None and len(labels) and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())}; classes are counted from 0")
    if labels is not None and len(labels) and int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"label {int(labels.max())}, but the network tells {logits.shape[1]} classes apart, counted "
                         f"from 0")


# --- batches ----------------------------------------------------------------------------------------------------------


def labelled_batches(inputs: Any, labels: Any = None, *, size: int = 128) -> Iterator[tuple[Any, Tensor | None]]:
    """Yield (batch, classes or None) of inputs in any form.

    Parameters
    ----------
    inputs : (N, channels, height, width); a torch data set of (image, class), such as ImageFolder; a DataLoader or an
        iterable of batches: images, (images, labels), or dicts; ``(images, labels)`` as one pair of tensors
    labels : of all samples in order; None if the inputs hold them, or there are none
    size : images per batch, where the inputs are not batches already

    Raises
    ------
    ValueError
        for labels given twice, too few or too many, and inputs of another form.
    """
    if _is_pair(inputs):
        if labels is not None:
            raise ValueError("labels are given twice, as an argument and with the images; give them once")
        inputs, labels = inputs
    if isinstance(inputs, Tensor):
        known = None if labels is None else class_numbers(labels)
        if known is not None and len(known) != len(inputs):
            raise ValueError(f"{len(inputs)} images and {len(known)} labels; give one label per image")
        yield from zip(inputs.split(size), [None] * len(inputs) if known is None else known.split(size), strict=False)
        return
    if isinstance(inputs, Dataset):
        inputs = DataLoader(inputs, batch_size=size, collate_fn=_stack)
    if not isinstance(inputs, Iterable) or isinstance(inputs, str | Mapping):
        raise ValueError(f"inputs are a {type(inputs).__name__}; give a tensor (N, channels, height, width), a data "
                         f"set, a DataLoader, or a list of batches")
    yield from _taken_apart(inputs, None if labels is None else class_numbers(labels))


def whole(inputs: Any, labels: Any = None) -> tuple[Tensor, Tensor]:
    """Return all images and their classes (N,) of inputs in any form of ``labelled_batches``."""
    if isinstance(inputs, Tensor) and labels is not None:
        return inputs, pair(inputs, labels)
    found = list(labelled_batches(inputs, labels))
    if not found or any(classes is None for _, classes in found):
        raise ValueError("labels are missing; give the class of each image, as an argument or with the images")
    images = torch.cat([batch for batch, _ in found])
    return images, pair(images, torch.cat([classes for _, classes in found if classes is not None]))


def have_labels(inputs: Any, labels: Any = None) -> bool | None:
    """Return whether the inputs come with labels; None if only reading a one-time iterator would tell."""
    if labels is not None or _is_pair(inputs):
        return True
    if isinstance(inputs, Iterator):
        return None
    first = next(labelled_batches(inputs, size=1), None)
    return first is not None and first[1] is not None


def _is_pair(inputs: Any) -> bool:
    return (isinstance(inputs, tuple | list) and len(inputs) == 2 and all(isinstance(x, Tensor) for x in inputs)
            and inputs[0].ndim == 4 and inputs[1].ndim < 4)


def _taken_apart(batches: Iterable[Any], labels: Tensor | None) -> Iterator[tuple[Any, Tensor | None]]:
    done = 0
    for item in batches:
        batch, inside = _parts(item)
        if labels is not None and inside is not None:
            raise ValueError("labels are given twice, as an argument and with the images; give them once")
        count = len(batch["input_ids"] if isinstance(batch, Mapping) else batch)
        classes = class_numbers(inside) if inside is not None else None
        if labels is not None:
            classes = labels[done:done + count]
        done += count
        if classes is not None and len(classes) != count:
            raise ValueError(f"a batch of {count} images and {len(classes)} labels; give one label per image")
        yield batch, classes
    if labels is not None and len(labels) != done:
        raise ValueError(f"{done} images and {len(labels)} labels; give one label per image")


def _parts(item: Any) -> tuple[Any, Any]:
    """Return images (or the dict of a language model) and labels of one batch."""
    if isinstance(item, Tensor):
        found: tuple[Any, Any] = item, None
    elif isinstance(item, Mapping) and "input_ids" in item:
        return item, None
    elif isinstance(item, Mapping) and any(key in item for key in IMAGE_KEYS):
        found = (next(item[key] for key in IMAGE_KEYS if key in item),
                 next((item[key] for key in LABEL_KEYS if key in item), None))
    elif isinstance(item, Sequence) and len(item) in (1, 2) and isinstance(item[0], Tensor):
        found = item[0], item[1] if len(item) == 2 else None
    else:
        raise ValueError(f"a batch is a {type(item).__name__}; give images (N, channels, height, width), (images, "
                         f"labels), or dicts of input_ids and attention_mask")
    if found[0].ndim != 4:
        raise ValueError(f"a batch has images of shape {tuple(found[0].shape)}; give (N, channels, height, width), for "
                         f"single images a DataLoader or torch.stack")
    return found


def _stack(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Return one batch of (image, class) samples; PIL images become uint8 pixels."""
    if not all(isinstance(sample, tuple | list) and len(sample) == 2 for sample in samples):
        raise ValueError("the data set does not yield (image, class) pairs; give a DataLoader that yields batches")
    images = [image if isinstance(image, Tensor) else _pixels(image) for image, _ in samples]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images of different shapes, such as {sorted(shapes)[:2]}; give the data set a transform "
                         f"that brings them to one size")
    return torch.stack(images), class_numbers(torch.as_tensor([int(label) for _, label in samples]))


def _pixels(image: Any) -> Tensor:
    with extra("vision"):
        from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image)
