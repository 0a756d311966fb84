"""Attacks keep their budget and lower the accuracy; FGSM equals five lines of PyTorch; masking is detected."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import hooks_of
from torch import nn

from pruning_lib.data import images
from pruning_lib.evaluation import attacks
from pruning_lib.evaluation.attacks import ATTACKS
from pruning_lib.models import image_networks
from pruning_lib.training import sgd


@pytest.fixture(scope="module")
def digits():
    """Return a network for digits, its test images, and their labels."""
    entry = images.IMAGES["digits"]
    config = image_networks.ImageConfig("cifar_resnet", {"depth": 8, "channels": 1}, entry.mean, entry.std)
    network = image_networks.build(config, seed=0)
    sgd.train(network, *images.load("digits", "train"), epochs=6, lr=0.1, seed=0, dtype="float32", augment=False)
    pixels, labels = images.load("digits", "test", 150)
    network.zero_grad()
    return network, sgd.pixels(pixels), labels


def some(name, digits):
    network, x, y = digits
    epsilon = 0.1 if ATTACKS.facts[name]["norm"] == "Linf" else 3.0
    return (network, x[:12], y[:12], 0.4) if name == "autoattack" else (network, x, y, epsilon)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_change_keeps_its_budget_and_stays_a_picture_and_the_accuracy_falls(name, digits):
    network, x, y, epsilon = some(name, digits)
    changed = ATTACKS[name](network, x, y, epsilon=epsilon, seed=1)
    sizes = attacks.norms(changed - x, ATTACKS.facts[name]["norm"])
    assert changed.shape == x.shape and changed.dtype == x.dtype and 0 <= changed.min() and changed.max() <= 1
    assert 0 < sizes.max() <= epsilon * (1 + 1e-4)
    before, after = attacks.correct_mask(network, x, y), attacks.correct_mask(network, changed, y)
    assert after.sum() < 0.8 * before.sum() and not (after & ~before).any()
    assert torch.equal(changed[~before], x[~before])  # needs no attack


@pytest.mark.parametrize("name", ATTACKS)
def test_without_a_budget_nothing_changes(name, digits):
    network, x, y, _ = some(name, digits)
    assert torch.equal(ATTACKS[name](network, x, y, epsilon=0), x)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "autoattack"])
def test_an_attack_obeys_its_seed_draws_from_no_global_generator_and_leaves_the_network_as_it_was(name, digits):
    network, x, y, epsilon = some(name, digits)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    first = ATTACKS[name](network, x[:20], y[:20], epsilon=epsilon, seed=1, steps=None)
    assert network.training and not hooks_of(network)
    network.eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor, weights[k]) for k, tensor in network.state_dict().items())
    torch.manual_seed(5)
    assert torch.equal(first, ATTACKS[name](network, x[:20], y[:20], epsilon=epsilon, seed=1))
    other = ATTACKS[name](network, x[:20], y[:20], epsilon=epsilon, seed=2)
    assert torch.equal(first, other) == ATTACKS.facts[name]["deterministic"]


@pytest.mark.parametrize("name", ["fgsm", "pgd", "square"])
def test_what_is_done_to_the_first_images_does_not_depend_on_those_behind(name, digits):
    network, x, y = digits
    assert len(x) > attacks.BLOCK
    whole = ATTACKS[name](network, x, y, epsilon=0.05, steps=1)
    alone = ATTACKS[name](network, x[:attacks.BLOCK], y[:attacks.BLOCK], epsilon=0.05, steps=1)
    assert torch.equal(whole[:attacks.BLOCK], alone)


def test_fgsm_is_five_lines(digits):
    network, x, y = digits
    ours = ATTACKS["fgsm"](network, x, y, epsilon=0.07)
    x = x.clone().requires_grad_()
    F.cross_entropy(network(x), y).backward()
    changed = (x + 0.07 * x.grad.sign()).clamp(0, 1).detach()
    hit = attacks.correct_mask(network, x.detach(), y)
    torch.testing.assert_close(ours[hit], changed[hit])


def test_pgd_steps_downhill_of_the_margin_in_steps_that_reach_the_edge(digits):
    """Check one image of one pixel: the score falls with the pixel, so PGD ends at the edge of the budget."""
    class OnePixel(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))

        def forward(self, x):
            return (x.flatten(1)[:, :1] - 0.2) * self.weight

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    assert ATTACKS["pgd"](OnePixel(), x, y, epsilon=0.125, steps=4).item() == pytest.approx(0.375)


def test_answers_are_those_of_each_budget_and_restarts_only_take_away(digits):
    network, x, y = digits
    budgets = [0.0, 0.1, 0.2]
    once = attacks.robust_correct("square", network, x, y, epsilons=budgets, steps=3)
    more = attacks.robust_correct("square", network, x, y, epsilons=budgets, steps=3, restarts=3)
    assert (once[0] == attacks.correct_mask(network, x, y).numpy()).all()
    assert once[0].mean() > once[1].mean() > once[2].mean()
    assert all((b <= a).all() for a, b in zip(once, more, strict=True)) and more[1].sum() < once[1].sum()


def test_the_smallest_change_answers_for_every_budget(digits):
    network, x, y = digits
    budgets = [0.2, 0.5, 1.0]
    found = attacks.robust_correct("cw", network, x, y, epsilons=budgets)
    changed = ATTACKS["cw"](network, x, y, epsilon=1.0)
    for epsilon, still in zip(budgets, found, strict=True):
        fooled = ~attacks.correct_mask(network, changed, y) & ((changed - x).flatten(1).norm(dim=1) <= epsilon)
        assert (still == (attacks.correct_mask(network, x, y) & ~fooled).numpy()).all()
    assert found[0].sum() > found[1].sum() > found[2].sum()
    small = ATTACKS["cw"](network, x, y, epsilon=0.3)  # larger changes are undone
    assert 0 < attacks.norms(small - x, "L2").max() <= 0.3 * (1 + 1e-4)


@pytest.mark.parametrize("epsilon", [0.15, 0.3])
@pytest.mark.parametrize("name", ["cw", "pgd_l2"])
def test_in_l2_an_attack_fools_no_fewer_than_one_step_along_the_gradient(name, epsilon, digits):
    """Allow one image more than a single gradient step; C&W with c = 1 and a fixed rate succeeded on fewer."""
    network, x, y = digits
    x, y = 0.2 + 0.6 * x[:80], y[:80]  # a pixel that is exactly 0 or 1 would stay
    start = x.clone().requires_grad_()
    F.cross_entropy(network(start), y).backward()
    step = epsilon * start.grad / attacks.norms(start.grad, "L2").view(-1, 1, 1, 1)
    stepped, clean = attacks.correct_mask(network, x + step, y), attacks.correct_mask(network, x, y)
    assert stepped.sum() < clean.sum() and 0 <= (x + step).min() and (x + step).max() <= 1
    network.zero_grad()
    assert attacks.robust_correct(name, network, x, y, epsilons=[epsilon])[0].sum() <= stepped.sum() + 1


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "autoattack"])
def test_colour_pictures_are_attacked_too_in_a_network_laid_out_channel_by_channel(name):
    """Cover channels-last input, because some attacks of torchattacks need contiguous tensors."""
    config = image_networks.ImageConfig("cifar_resnet", {"depth": 8}, (0.5,) * 3, (0.25,) * 3)
    network = image_networks.build(config, seed=0)
    network.eval().to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = network(x).argmax(1)
    epsilon = 0.3 if ATTACKS.facts[name]["norm"] == "Linf" else 8.0
    sizes = attacks.norms(ATTACKS[name](network, x, y, epsilon=epsilon) - x, ATTACKS.facts[name]["norm"])
    assert 0 < sizes.max() <= epsilon * (1 + 1e-4)


def test_an_honest_network_shows_no_sign_of_masking_and_a_masking_one_does(digits):
    network, x, y = digits

    class Rounding(nn.Module):
        """The same predictions behind a staircase function without gradient."""

        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return self.inner(x + (x * 16).round() / 16 - x) if not x.requires_grad else self.inner(
                (x * 16).round() / 16 + 0 * x)

    honest = attacks.masking_checks(network, x[:100], y[:100], epsilon=0.08)
    assert honest["signs"] == "" and honest["no_budget_fraction"] == 0
    assert honest["pgd_restarts_fraction"] <= honest["pgd_fraction"] <= honest["fgsm_fraction"]
    masked = attacks.masking_checks(Rounding(), x[:100], y[:100], epsilon=0.08)
    assert "the black box is stronger" in masked["signs"] and "without a budget" in masked["signs"]


@pytest.mark.parametrize("wrong, message", [
    (dict(epsilon=-0.1), "epsilon=-0.1; give a budget of 0 or more"), (dict(epsilon=0.1, steps=2), "fgsm takes 1"),
    (dict(epsilon=0.1, images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), "give floats in"),
    (dict(epsilon=0.1, images=torch.full((2, 1, 8, 8), 1.5)), "give floats in"),
    (dict(epsilon=0.1, images=torch.full((2, 1, 8, 8), torch.nan)), "give floats in"),
    (dict(epsilon=torch.nan), "epsilon=nan; give a budget"),
    (dict(epsilon=0.1, labels=torch.zeros(3)), "2 images and 3 labels")])
def test_what_cannot_be_attacked_is_refused(wrong, message, digits):
    given = {"images": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2).long(), **wrong}
    with pytest.raises(ValueError, match=message):
        ATTACKS["fgsm"](digits[0], given.pop("images"), given.pop("labels"), **given)


def test_what_an_attack_cannot_do_is_refused_and_not_ignored(digits):
    network, x, y = digits
    with pytest.raises(ValueError, match="steps=100; autoattack takes 10"):
        ATTACKS["autoattack"](network, x[:2], y[:2], epsilon=0.1, steps=100)
    with pytest.raises(ValueError, match="restarts=2; cw starts from the image itself"):
        attacks.robust_correct("cw", network, x[:2], y[:2], epsilons=[0.1], restarts=2)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    for name in ("apgd_square", "autoattack"):
        with pytest.raises(ValueError, match="2 classes; AutoAttack's loss needs at least 4. Use pgd and square"):
            ATTACKS[name](two, x[:8], two(x[:8]).argmax(1), epsilon=0.1)


def test_an_attack_shows_the_arguments_it_takes():
    assert all(list(inspect.signature(attack).parameters) == ["model", "images", "labels", "epsilon", "seed", "steps"]
               and attack.__name__ == name for name, attack in ATTACKS.items())


def test_an_unknown_attack_is_answered_with_the_known_ones(digits):
    with pytest.raises(ValueError, match="unknown attack 'bim'; known: apgd_square, autoattack, cw, fgsm, pgd"):
        attacks.robust_correct("bim", *digits, epsilons=[0.1])
