import torch
from attack import fgsm, pgd

DRAW = torch.Generator().manual_seed(3)
NETWORK = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
for parameter in NETWORK.parameters():
    parameter.data = torch.randn(parameter.shape, generator=DRAW) * 0.7
IMAGES = torch.rand(64, 8, generator=DRAW)
LABELS = NETWORK(IMAGES).argmax(1)  # without attack every image is right


def loss(images):
    return torch.nn.functional.cross_entropy(NETWORK(images), LABELS, reduction="none").detach()


def test_one_step_on_a_linear_network_is_known():
    weight = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    images = torch.tensor([[0.5, 0.5], [0.95, 0.5]])
    changed = fgsm(lambda x: x @ weight.T, images, torch.tensor([0, 1]), 0.1)
    torch.testing.assert_close(changed, torch.tensor([[0.4, 0.6], [1.0, 0.4]]))  # 1.05 is clipped to 1


def test_the_budget_is_kept_and_pixels_stay_pixels():
    for changed in (fgsm(NETWORK, IMAGES, LABELS, 0.1), pgd(NETWORK, IMAGES, LABELS, 0.1, 10)):
        assert (changed - IMAGES).abs().max() <= 0.1 + 1e-6
        assert changed.min() >= 0 and changed.max() <= 1 and not changed.requires_grad


def test_the_loss_rises_and_many_steps_raise_it_further():
    once, often = fgsm(NETWORK, IMAGES, LABELS, 0.1), pgd(NETWORK, IMAGES, LABELS, 0.1, 10)
    assert loss(IMAGES).mean() < loss(once).mean() < loss(often).mean()


def test_one_step_of_pgd_is_cut_back_to_fgsm():
    torch.testing.assert_close(pgd(NETWORK, IMAGES, LABELS, 0.1, 1), fgsm(NETWORK, IMAGES, LABELS, 0.1))


def test_the_attack_is_on_each_image_alone():
    alone = fgsm(NETWORK, IMAGES[:1], LABELS[:1], 0.05)
    torch.testing.assert_close(alone, fgsm(NETWORK, IMAGES, LABELS, 0.05)[:1])


def test_without_a_budget_nothing_changes():
    torch.testing.assert_close(fgsm(NETWORK, IMAGES, LABELS, 0.0), IMAGES)
