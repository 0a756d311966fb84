"""Adversarial attacks on image classifiers: one entry of ``ATTACKS`` each, all computed by torchattacks.

Pixels are in [0, 1] and networks normalise them internally, so a budget is in pixels: ``epsilon = 1 / 255`` is one grey
level.  A budget of norm "Linf" bounds the change of every pixel.  A budget of norm "L2" bounds the Euclidean norm of
the change of an image.  Misclassified images are not attacked and stay unchanged.
Order of this file: registration · execution · attacks · robust accuracy · checks against gradient masking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_lib._extras import extra
from pruning_lib._registry import Table
from pruning_lib.data import labelled_images
from pruning_lib.evaluation.correctness import correct_mask as correct_mask  # taught under this name too
from pruning_lib.models.hooks import evaluating

with extra("robustness"):
    import torchattacks

ATTACKS: Table = Table("attack")
BLOCK = 128  # images attacked together, in order; some attacks draw random numbers or stop for a whole batch


def register_attack(name: str, *, norm: str, access: str, steps: int, about: str, minimal_norm: bool = False,
                    fixed: bool = False, deterministic: bool = False) -> Callable:
    """Return a decorator that registers ``f(model, images, labels, epsilon, seed, steps)`` in ``ATTACKS``.

    Parameters
    ----------
    norm : norm of the budget, "Linf" or "L2"
    access : access to the network: "gradients" (white box) or "scores" (black box)
    steps : default number of gradient steps, or of queries
    minimal_norm : True for attacks that minimise the change; changes beyond the budget are undone
    fixed : True where the number of steps cannot be changed
    deterministic : True where the seed changes nothing
    """
    def enter(f: Callable) -> Callable:
        @wraps(f)
        def attack(model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int = 0,
                   steps: int | None = None) -> Tensor:
            labels = validate(images, labels, epsilon)
            if steps is not None and (steps < 1 or fixed and steps != usual):
                raise ValueError(f"steps={steps}; {name} takes {usual if fixed else 'at least 1'}")
            return _in_blocks(f, model, images, labels, epsilon, seed, steps or usual, norm)

        del attack.__wrapped__  # its signature is the one above
        return ATTACKS.register(name, norm=norm, access=access, steps=usual, about=about,
                                minimal_norm=minimal_norm, deterministic=deterministic)(attack)

    usual = steps
    return enter


def validate(images: Tensor, labels: Any, epsilon: float) -> Tensor:
    """Return the classes (N,); raise ValueError unless pixels are floats in [0, 1] and the budget is valid."""
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):  # NaN is neither
        raise ValueError(f"pixels are {images.dtype} from {images.min()} to {images.max()}; give floats in [0, 1], "
                         f"such as training.sgd.pixels(images)")
    classes = labelled_images.pair(images, labels)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon}; give a budget of 0 or more, in pixels: 1 / 255 is one grey level")
    return classes


def norms(change: Tensor, norm: str) -> Tensor:
    """Return the norm (N,) of each change (N, channels, height, width)."""
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def _in_blocks(f: Callable, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, seed: int, steps: int,
               norm: str) -> Tensor:
    """Attack block by block; the result of a block depends only on its images, the seed and its position."""
    changed, device = images.clone(), next(model.parameters()).device
    for start in range(0, len(images) if epsilon else 0, BLOCK):
        x, y = images[start:start + BLOCK], labels[start:start + BLOCK]
        chosen = correct_mask(model, x, y).nonzero().flatten()
        if len(chosen):
            batch = x[chosen].to(device, memory_format=torch.channels_last)
            with evaluating(model), _frozen(model), _seeded(seed * 100_003 + start, device):
                found = f(model, batch, y[chosen].to(device), epsilon, seed, steps).detach().cpu()
            within = norms(found - x[chosen], norm) <= epsilon * (1 + 1e-5) + 1e-7  # float32 rounds
            changed[start + chosen[within]] = found[within]
    return changed


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switch off gradients of the weights inside the block; an attack needs those of the pixels only."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that torchattacks draws from, and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@register_attack("fgsm", norm="Linf", access="gradients", steps=1, fixed=True, deterministic=True,
                 about="one step along the sign of the gradient")
def fgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return images after one step along the sign of the gradient (Goodfellow et al. 2015, arXiv:1412.6572)."""
    return torchattacks.FGSM(model, eps=epsilon)(x, y)


@register_attack("pgd", norm="Linf", access="gradients", steps=20, about="many small steps from a random start")
def pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return images after projected gradient descent (Madry et al. 2018, arXiv:1706.06083).

    The step size is 2.5 times the budget divided by the number of steps.
    """
    return torchattacks.PGD(model, eps=epsilon, alpha=2.5 * epsilon / steps, steps=steps, random_start=True)(x, y)


@register_attack("pgd_l2", norm="L2", access="gradients", steps=20,
                 about="many small steps of one length from a random start")
def pgd_l2(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return images after ``pgd`` in the L2 ball, with steps along the normalised gradient."""
    # torchattacks needs contiguous images and gradients; Flatten and Unflatten make the gradients contiguous
    laid_out = nn.Sequential(nn.Flatten(), nn.Unflatten(1, x.shape[1:]), model).eval()
    attack = torchattacks.PGDL2(laid_out, eps=epsilon, alpha=2.5 * epsilon / steps, steps=steps, random_start=True)
    return attack(x.contiguous(), y)


@register_attack("cw", norm="L2", access="gradients", steps=50, minimal_norm=True, deterministic=True,
                 about="a change that fools, made smaller from there")
def cw(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return the smaller successful change of Carlini and Wagner's attack for two values of c (2017, arXiv:1608.04644).

    The authors search for c image by image; torchattacks leaves the search out.  If c is too large, a misclassified
    image stays far beyond the decision boundary.  If c is too small, the image never crosses it.  With c equal to a
    quarter of the squared budget, a change of the size of the budget weighs as much as a margin of four; with c equal
    to the squared budget, as much as a margin of one.
    Adam moves a pixel by up to half its learning rate per step.  The rate is chosen so that all steps in one direction
    add up to five times the budget.  With a larger rate a single step can exceed the budget, and no change within the
    budget is ever evaluated.
    A pixel of exactly 0 or 1 does not move, because the change of variables is flat there.  On digits, which are mostly
    black, this makes the attack weaker.  The attack stops for a whole block when the mean loss rises.
    """
    rate = 5 * epsilon / steps / (0.5 * math.sqrt(x[0].numel()))
    best, size = x, torch.full((len(x),), math.inf, device=x.device)
    for c in (epsilon ** 2 / 4, epsilon ** 2):
        found = torchattacks.CW(model, c=c, kappa=0, steps=steps, lr=rate)(x, y).detach()
        with torch.no_grad():
            fooled = model(found).argmax(1) != y
        found_size = torch.where(fooled, norms(found - x, "L2"), math.inf)
        best = torch.where((found_size < size).view(-1, 1, 1, 1), found, best)
        size = torch.minimum(size, found_size)
    return best


@register_attack("square", norm="Linf", access="scores", steps=200,
                 about="random squares, kept where the margin shrinks")
def square(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return images after Square with ``steps`` queries (Andriushchenko et al. 2020, arXiv:1912.00049)."""
    return torchattacks.Square(model, norm="Linf", eps=epsilon, n_queries=steps, seed=_block_seed())(x, y)


@register_attack("apgd_square", norm="Linf", access="gradients", steps=10,
       about="two of AutoAttack's four: APGD on cross-entropy and on every other class, then a short Square")
def apgd_square(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return images after the part of AutoAttack that is feasible on a CPU.

    FAB is left out, and Square has 10 queries per APGD step instead of 5,000 queries.

    Raises
    ------
    ValueError
        for fewer than four classes; the loss of APGD needs four.
    """
    classes = _four_or_more(model, x)
    shared: dict[str, Any] = {"norm": "Linf", "eps": epsilon, "seed": _block_seed()}
    return torchattacks.MultiAttack([
        torchattacks.APGD(model, steps=steps, loss="ce", **shared),
        torchattacks.APGDT(model, steps=steps, n_classes=classes, **shared),
        torchattacks.Square(model, n_queries=10 * steps, **shared)])(x, y)


@register_attack("autoattack", norm="Linf", access="gradients", steps=10, fixed=True,
       about="AutoAttack's standard four: APGD twice, FAB, and Square with 5,000 questions; for a GPU")
def autoattack(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, steps: int) -> Tensor:
    """Return images after AutoAttack as torchattacks implements it (Croce and Hein 2020, arXiv:2003.01690).

    APGD takes 10 steps there, against 100 in the paper.

    Raises
    ------
    ValueError
        for fewer than four classes, as in ``apgd_square``.
    """
    return torchattacks.AutoAttack(model, eps=epsilon, n_classes=_four_or_more(model, x), seed=_block_seed())(x, y)


def _block_seed() -> int:
    """Return an integer seed, drawn from the seeded generator of the block."""
    return int(torch.randint(2 ** 31, (1,)))


def _four_or_more(model: nn.Module, x: Tensor) -> int:
    """Return the number of classes; raise ValueError below four, which the loss of APGD needs."""
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if classes < 4:
        raise ValueError(f"{classes} classes; AutoAttack's loss needs at least 4. Use pgd and square")
    return classes


def robust_correct(name: str, model: nn.Module, images: Tensor, labels: Tensor, *, epsilons: Sequence[float],
                   seed: int = 0, steps: int | None = None, restarts: int = 1) -> list[np.ndarray]:
    """Return (N,) booleans for each budget: True where an image is still classified correctly under attack.

    Parameters
    ----------
    name : key of ``ATTACKS``
    epsilons : budgets, in the norm of the attack
    restarts : number of attacks with different seeds; an image is robust only if all of them fail
    """
    if restarts < 1:
        raise ValueError(f"restarts={restarts}; give at least 1")
    attack, labels = ATTACKS[name], labelled_images.pair(images, labels)
    facts = ATTACKS.facts[name]
    if facts["minimal_norm"]:  # one attack serves all budgets
        if restarts > 1:
            raise ValueError(f"restarts={restarts}; {name} starts from the image itself and allows one start only")
        return _minimal_norm_correct(attack, model, images, labels, epsilons, seed, steps, facts["norm"])
    found = []
    for epsilon in epsilons:
        still = correct_mask(model, images, labels)
        for restart in range(restarts):
            left = still.nonzero().flatten()
            if len(left):
                changed = attack(model, images[left], labels[left], epsilon=epsilon, seed=seed + restart, steps=steps)
                still[left] = correct_mask(model, changed, labels[left])
        found.append(still.numpy())
    return found


def _minimal_norm_correct(attack: Callable, model: nn.Module, images: Tensor, labels: Tensor,
                         epsilons: Sequence[float], seed: int, steps: int | None, norm: str) -> list[np.ndarray]:
    changed = attack(model, images, labels, epsilon=max(epsilons, default=0), seed=seed, steps=steps)
    clean, fooled = correct_mask(model, images, labels), ~correct_mask(model, changed, labels)
    size = norms(changed - images, norm)
    return [(clean & ~(fooled & (size <= epsilon * (1 + 1e-5)))).numpy() for epsilon in epsilons]


def masking_checks(model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int = 0, steps: int = 10,
                   restarts: int = 3, slack: float = 0.01) -> dict[str, Any]:
    """Return signs of gradient masking: an attack may fail because of useless gradients and not because of robustness.

    The checks follow Athalye et al. 2018, arXiv:1802.00420.  More steps and more starts must not raise the accuracy.
    One step must not beat many.  The black box must not beat the white box.  With a budget of 0.5 no image may be
    classified correctly.

    Returns
    -------
    accuracies ``<attack>_fraction``, and ``signs``: names of the checks violated by more than ``slack``; empty if none
    """
    def accuracy(name: str, budget: float = epsilon, **more: Any) -> float:
        return float(robust_correct(name, model, images, labels, epsilons=[budget], seed=seed, **more)[0].mean())

    found = {"fgsm": accuracy("fgsm"), "pgd": accuracy("pgd", steps=steps),
             "pgd_more_steps": accuracy("pgd", steps=4 * steps),
             "pgd_restarts": accuracy("pgd", steps=steps, restarts=restarts),
             "square": accuracy("square"), "no_budget": accuracy("pgd", budget=0.5, steps=4 * steps)}
    rules = [("pgd_more_steps", "pgd", "more steps help the network"), ("pgd_restarts", "pgd", "restarts help it"),
             ("pgd_more_steps", "fgsm", "one step beats many"),
             ("pgd_more_steps", "square", "the black box is stronger")]
    signs = [words for strong, weak, words in rules if found[strong] > found[weak] + slack]
    signs += ["images stay right without a budget"] if found["no_budget"] > slack else []
    return {**{f"{name}_fraction": value for name, value in found.items()}, "signs": "; ".join(signs)}
