"""Blocks are recognised after a cut and some tuning; unrelated networks are refused."""

import pytest
import torch
from conftest import image_network

from pruning_lib.evaluation import kernel_alignment
from pruning_lib.models import surgery
from pruning_lib.models.block_plan import BlockPlan


def tuned(network, amount, seed):
    """Move every kernel a little, as tuning does."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data += amount * module.weight.std() * torch.randn(module.weight.shape, generator=generator)
    return network


def cut(network, *names):
    return surgery.remove(network, BlockPlan.of(network, names))


def test_a_chain_of_cuts_is_traced_to_the_first_network():
    whole = image_network("cifar_resnet", depth=26)
    once = tuned(cut(whole, "layer1.1"), 1.0, 1)
    twice = tuned(cut(once, "layer2.2", "layer1.0"), 1.0, 2)
    first, second = kernel_alignment.align_chain([whole, once, twice])
    names = [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(4)]
    assert first.origins == tuple(n for n in names if n != "layer1.1")
    assert second.origins == tuple(n for n in names if n not in ("layer1.1", "layer1.0", "layer2.2"))
    assert min(first.lowest_match, second.lowest_match) > 0.5 > 0.2 > max(first.highest_other, second.highest_other)


def test_networks_that_are_not_related_are_refused():
    with pytest.raises(ValueError, match="not related"):
        kernel_alignment.align(image_network("cifar_resnet", depth=26, seed=1), image_network("cifar_resnet", depth=26))
