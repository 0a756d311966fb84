"""Removing a block equals skipping it, bit for bit."""

import copy
from contextlib import ExitStack

import pytest
import torch
import torchvision
from conftest import image_network, pixels

from pruning_lib.models import families, image_networks, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.hooks import skip_block
from pruning_lib.pruning.selection import choose

IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(5))
SMALL = {"A": ("cifar_resnet", {"depth": 20}), "projection": ("cifar_resnet", {"depth": 20, "shortcut": "projection"}),
         "grey": ("cifar_resnet", {"depth": 14, "channels": 1, "mean": (0.3,), "std": (0.4,)})}


def logits(model, data):
    with torch.no_grad():
        out = model(data)
    return getattr(out, "logits", out)


def with_bypasses(model, names, data):
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(skip_block(model, name))
        return logits(model, data)


def removable(model):
    return [block.name for block in families.residual_blocks(model) if block.removable]


def assert_removing_is_bypassing(model, names, data):
    plan = BlockPlan.of(model, names)
    pruned = surgery.remove(model, plan)
    found = logits(pruned, data)
    assert torch.equal(found, with_bypasses(model, names, data)), names
    assert not torch.equal(found, logits(model, data))  # the removed block mattered
    assert len(families.residual_blocks(pruned)) == len(plan.kept)
    gone = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    assert sum(p.numel() for p in pruned.parameters()) == sum(p.numel() for p in model.parameters()) - gone
    return pruned


@pytest.mark.parametrize("case", SMALL)
def test_every_block_of_a_small_image_network(case):
    name, arguments = SMALL[case]
    network = image_network(name, **arguments)
    data, names = pixels(channels=arguments.get("channels", 3)), removable(network)
    assert len(names) == {"A": 7, "projection": 7, "grey": 4}[case]
    for block in names:
        assert_removing_is_bypassing(network, [block], data)
    assert_removing_is_bypassing(network, names, data)


@pytest.mark.parametrize("name", [name for name in image_networks.NETWORKS if name != "cifar_resnet"])
def test_blocks_of_every_named_network(name):
    """Remove the first, the last, and every second block together, to save time."""
    network = image_network(name, classes=7)
    names = removable(network)
    assert len(names) == {"resnet18": 5, "resnet34": 13, "resnet50": 12, "resnet101": 29, "mobilenet_v2": 10,
                          "keras_resnet": 25}[name]
    for some in ([names[0]], [names[-1]], names[::2]):
        assert_removing_is_bypassing(network, some, pixels(network.config.arguments.get("size", 64))[:1])


def test_a_network_as_torchvision_makes_it_can_be_cut_too():
    network = torchvision.models.mobilenet_v2(num_classes=4).eval()
    assert_removing_is_bypassing(network, ["features.3", "features.13"], pixels(64))


# qwen: the second and the fourth block have a window of 4 tokens; all others have full attention
WINDOWED = {"use_sliding_window": True, "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}


def language_model(tiny, family, *, n_blocks=4, **more):
    return tiny(family, n_blocks=n_blocks, heads=6, groups=3,
                fields=WINDOWED if family.startswith("qwen") else {}, **more)


def test_every_block_of_a_language_model(family, tiny):
    model = language_model(tiny, family)
    for i in range(4):
        assert_removing_is_bypassing(model, [f"model.layers.{i}"], IDS)
    assert_removing_is_bypassing(model, ["model.layers.2", "model.layers.0"], IDS)
    assert_removing_is_bypassing(model, [f"model.layers.{i}" for i in (0, 1, 3)], IDS)


def test_the_key_value_cache_counts_the_blocks_that_are_there(family, tiny):
    """Renumber blocks: one with its old number would read the keys of another block, or none."""
    model = language_model(tiny, family, dtype=torch.float64)
    names = ["model.layers.0", "model.layers.2"]
    pruned = surgery.remove(model, BlockPlan.of(model, names))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS), "eos_token_id": None}
    cached, plain = (pruned.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert cached.shape[1] == 19 and torch.equal(cached, plain)
    assert [m.layer_idx for m in pruned.modules() if hasattr(m, "layer_idx")] == [0, 1]
    with skip_block(model, names[0]), skip_block(model, names[1]):
        assert torch.equal(model.generate(IDS, use_cache=False, **options), cached)


def test_the_config_of_a_language_model_counts_them_too(family, tiny):
    model = language_model(tiny, family)
    before = model.config.to_dict()
    pruned = surgery.remove(model, BlockPlan.of(model, ["model.layers.1", "model.layers.2"]))
    assert pruned.config.num_hidden_layers == 2 and pruned.model.config is pruned.config
    if family.startswith("qwen"):
        assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.to_dict() == before


def test_image_blocks_move_up_and_the_config_remembers_what_they_were():
    network = image_network("cifar_resnet", depth=20)
    once = surgery.remove(network, BlockPlan.of(network, ["layer1.1", "layer3.1"]))
    assert [b.name for b in families.residual_blocks(once)] == [
        "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "layer3.0", "layer3.1"]
    assert once.config.kept_blocks == (
        "layer1.0", "layer1.2", "layer2.0", "layer2.1", "layer2.2", "layer3.0", "layer3.2")
    assert torch.equal(once.layer1[1].conv1.weight, network.layer1[2].conv1.weight)
    twice = surgery.remove(once, BlockPlan.of(once, ["layer1.1", "layer2.1"]))
    assert twice.config.kept_blocks == ("layer1.0", "layer2.0", "layer2.2", "layer3.0", "layer3.2")
    assert network.config.kept_blocks == tuple(b.name for b in families.residual_blocks(network))
    gone = ["layer1.1", "layer3.1", "layer1.2", "layer2.1"]
    assert torch.equal(logits(twice, pixels()), with_bypasses(network, gone, pixels()))


def test_the_original_stays_whole_unless_it_is_cut_in_place(tiny):
    for model, name, data in ((tiny("llama"), "model.layers.0", IDS),
                              (image_network("cifar_resnet", depth=14), "layer1.0", pixels())):
        before, dense = copy.deepcopy(model.state_dict()), logits(model, data)
        plan = BlockPlan.of(model, [name])
        pruned = surgery.remove(model, plan)
        assert torch.equal(logits(model, data), dense)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert surgery.remove(model, plan, inplace=True) is model
        assert torch.equal(logits(model, data), logits(pruned, data))


def test_a_plan_for_other_blocks_is_refused_before_anything_is_cut(tiny):
    """Refuse to apply a plan twice: after a removal the blocks are renumbered, and it would remove another block."""
    for model, name in ((tiny("llama", n_blocks=3), "model.layers.0"),
                        (image_network("cifar_resnet", depth=20), "layer1.0")):
        plan = BlockPlan.of(model, [name])
        surgery.remove(model, plan, inplace=True)
        left = families.residual_blocks(model)
        with pytest.raises(ValueError, match="other blocks.*pruned already.*new plan"):
            surgery.remove(model, plan, inplace=True)
        assert families.residual_blocks(model) == left


def test_blocks_and_width_can_go_in_either_order(family, tiny, random_importance):
    model = language_model(tiny, family)

    def narrower(model, seed):
        return surgery.remove(model, choose(random_importance(model, seed=seed), model, removed_fraction=0.2,
                                            heads_removed="same_share"))

    def shorter(model):
        plan = BlockPlan.of(model, ["model.layers.1"])
        return surgery.remove(model, plan), with_bypasses(model, plan.removed, IDS)

    thin = narrower(model, 0)
    both, expected = shorter(thin)
    assert torch.equal(logits(both, IDS), expected)
    short = shorter(model)[0]
    other = narrower(short, 1)
    assert families.sizes(other).blocks == families.sizes(both).blocks == 3
    assert families.parameter_count(other) < families.parameter_count(short) and logits(other, IDS).isfinite().all()


def test_a_cut_image_network_learns():
    network = image_network("cifar_resnet", depth=14)
    pruned = surgery.remove(network, BlockPlan.of(network, ["layer2.1"])).train()
    pruned(pixels()).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())
