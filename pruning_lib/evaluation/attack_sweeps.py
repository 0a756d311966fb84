"""Attack one network at many budgets for little more than the price of one.

Three facts make it cheap, and none makes an attack weaker.  A change that fits a budget fits every larger one, so an
image that was fooled needs no attack at a larger budget.  FGSM's direction does not depend on the budget, so one
gradient serves all.  In evaluation mode a batch norm is a scaling, which the convolution before it can carry.
The attacks themselves are those of ``attacks``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pruning_lib.evaluation import attacks
from pruning_lib.models.hooks import evaluating


def fused(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose convolutions carry the batch norms behind them, without gradients.

    It computes the same up to rounding.  Pairs are found by name: ``bn1`` stands behind ``conv1``, ``bn2`` behind
    ``conv2``, as in all residual networks here; other batch norms stay.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            convolution = getattr(module, name.replace("bn", "conv"), None)
            if name.startswith("bn") and isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
                setattr(module, name.replace("bn", "conv"), fuse_conv_bn_eval(convolution, norm))
                setattr(module, name, nn.Identity())
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilons: Sequence[float]) -> list[np.ndarray]:
    """Return which images are still right under FGSM, (N,) booleans per budget; each budget stands alone.

    The same answers as ``attacks`` gives for "fgsm", with one gradient instead of one per budget.
    """
    attacks.validate(images, labels, max(epsilons, default=0.0))
    still = np.zeros((len(epsilons), len(images)), bool)
    for start in range(0, len(images), attacks.BLOCK):
        block = slice(start, start + attacks.BLOCK)
        for correct, found in zip(still, _fgsm_block(model, images[block], labels[block], epsilons), strict=True):
            correct[block] = found
    return list(still)


def _fgsm_block(model: nn.Module, x: Tensor, y: Tensor, epsilons: Sequence[float]) -> list[np.ndarray]:
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with evaluating(model):
        logits = model(x)
        clean = logits.argmax(1) == y
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    x = x.detach()
    changed = [(x + epsilon * gradient.sign()).clamp(0, 1) for epsilon in epsilons]
    return [(clean & attacks.correct_mask(model, image, y)).numpy() for image in changed]


def survivors(name: str, model: nn.Module, images: Tensor, labels: Tensor, *, epsilons: Sequence[float],
              left: Sequence[np.ndarray] | None = None, seed: int = 0, steps: int | None = None) -> list[np.ndarray]:
    """Return which images no attack has fooled within each budget, (N,) booleans per budget.

    At every budget only those images are attacked that earlier attacks and smaller budgets have left.  Another start of
    a random attack is another call, with another seed and the images left by the first.

    Parameters
    ----------
    name : key of ``attacks.ATTACKS``
    epsilons : budgets in ascending order, in the norm of the attack
    left : images left by earlier attacks of the same norm at each budget; None: all images
    seed, steps : as ``attacks`` takes them

    Raises
    ------
    ValueError
        for budgets that do not ascend.
    """
    if list(epsilons) != sorted(epsilons):
        raise ValueError(f"epsilons={list(epsilons)}; give them in ascending order")
    found: list[np.ndarray] = []
    standing = np.ones(len(images), bool)
    for i, epsilon in enumerate(epsilons):
        standing = standing & left[i] if left is not None else standing.copy()
        chosen = torch.from_numpy(standing.nonzero()[0])
        if len(chosen):
            more: dict[str, Any] = {"epsilons": [epsilon], "seed": seed, "steps": steps}
            standing[chosen.numpy()] = attacks.robust_correct(name, model, images[chosen], labels[chosen], **more)[0]
        found.append(standing)
    return found
