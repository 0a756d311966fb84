"""A sweep gives the answers of single attacks, or fewer right ones, never more."""

import numpy as np
import pytest
import torch
from conftest import image_network

from pruning_lib.evaluation import attack_sweeps, attacks

NETWORKS = {"cifar_resnet": {"depth": 8, "channels": 1, "classes": 4, "mean": (0.4,), "std": (0.3,)},
            "keras_resnet": {"blocks": (1, 1, 1), "channels": 1, "classes": 4, "size": 8, "mean": (0.0,),
                             "std": (1.0,)},
            "resnet18": {"classes": 4, "mean": (0.4, 0.5, 0.3), "std": (0.2, 0.3, 0.25)}}


@pytest.fixture(scope="module", params=["cifar_resnet", "keras_resnet"])
def subject(request):
    """A small network and 40 images, most of which it answers with their label."""
    network = image_network(request.param, **NETWORKS[request.param])
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.linear.bias -= network(images).mean(0)  # or one class would win everywhere, out of any attack's reach
        labels = network(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    return network, images, labels


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_computes_the_same_without_batch_norms(name):
    network = image_network(name, **NETWORKS[name])
    x = torch.rand(3, network.config.arguments.get("channels", 3), 8, 8, generator=torch.Generator().manual_seed(1))
    fused = attack_sweeps.fused(network)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-4)
    left = [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(left) == (3 if name == "resnet18" else 0)  # the three of its shortcuts have other names
    assert not any(p.requires_grad for p in fused.parameters()) and all(p.requires_grad for p in network.parameters())


def test_one_gradient_gives_what_fgsm_gives_at_every_budget(subject):
    epsilons = [0.0, 0.02, 0.1]
    expected = attacks.robust_correct("fgsm", *subject, epsilons=epsilons)
    np.testing.assert_array_equal(attack_sweeps.fgsm(*subject, epsilons), expected)
    assert expected[0].sum() == 37 and expected[2].sum() < 37


@pytest.mark.parametrize("name, epsilons", [("pgd", [0.01, 0.03]), ("pgd_l2", [0.1, 0.4]), ("square", [0.02, 0.1])])
def test_survivors_are_those_of_the_attack_and_never_come_back(subject, name, epsilons):
    single = attacks.robust_correct(name, *subject, epsilons=epsilons[:1], steps=5)[0]
    first = attack_sweeps.survivors(name, *subject, epsilons=epsilons, steps=5)
    np.testing.assert_array_equal(first[0], single)
    second = attack_sweeps.survivors(name, *subject, epsilons=epsilons, steps=5, seed=1, left=first)
    assert all((after <= before).all() for before, after in [*zip(first, second, strict=True), first, second])
    assert first[1].sum() < first[0].sum() <= 37


def test_an_image_that_an_earlier_attack_fooled_stays_fooled(subject):
    nobody = [np.zeros(40, bool)] * 2
    assert not np.any(attack_sweeps.survivors("pgd", *subject, epsilons=[0.01, 0.03], steps=2, left=nobody))


def test_budgets_have_to_ascend(subject):
    with pytest.raises(ValueError, match="ascending"):
        attack_sweeps.survivors("pgd", *subject, epsilons=[0.03, 0.01])
