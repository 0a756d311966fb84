"""Solution of exercise 7."""

import torch


def direction(network, images, labels):
    """Return the sign of the gradient of the loss at ``images``."""
    images = images.detach().clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(network(images), labels, reduction="sum").backward()
    return images.grad.sign()


def fgsm(network, images, labels, epsilon):
    """Return images after one step along the sign of the gradient."""
    return (images + epsilon * direction(network, images, labels)).clamp(0, 1)


def pgd(network, images, labels, epsilon, steps):
    """Return images after several projected steps."""
    changed = images.clone()
    for _ in range(steps):
        changed = changed + 2.5 * epsilon / steps * direction(network, changed, labels)
        changed = torch.minimum(torch.maximum(changed, images - epsilon), images + epsilon).clamp(0, 1)
    return changed
