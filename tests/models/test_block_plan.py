"""A block plan refuses unknown blocks and blocks that cannot be removed."""

import dataclasses

import pytest
from conftest import image_network

from pruning_lib.models.block_plan import BlockPlan


@pytest.fixture(scope="module")
def resnet20():
    return image_network("cifar_resnet", depth=20)


def test_a_plan_says_what_stays(resnet20):
    plan = BlockPlan.of(resnet20, ["layer3.2", "layer1.0", "layer3.1"])
    assert plan.kept == ("layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2", "layer3.0")
    assert plan.kept_per_stage == {0: 2, 1: 3, 2: 1}
    assert str(plan) == ("removes 3 of 9 blocks (layer3.2, layer1.0, layer3.1); blocks kept per stage: 2, 3, 1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.removed = ()


def test_a_stage_may_be_emptied_and_still_counts(resnet20):
    assert BlockPlan.of(resnet20, ["layer1.0", "layer1.1", "layer1.2"]).kept_per_stage == {0: 0, 1: 3, 2: 3}


@pytest.mark.parametrize(("removed", "message"), [
    (["layer1.3"], "no block is called 'layer1.3'; blocks: layer1.0, .*layer3.2"),
    (["layer1", "conv1", "layer1.1"], "no block is called 'layer1', 'conv1';"),
    (["layer2.0", "layer2.1"], "layer2.0 cannot be removed, the shape changes.*removable: layer1.0, .*layer2.1, "),
    (["layer1.1", "layer1.1"], "named twice"),
])
def test_what_cannot_go_is_refused_with_what_can(resnet20, removed, message):
    with pytest.raises(ValueError, match=message):
        BlockPlan.of(resnet20, removed)


def test_a_language_model_keeps_one_block(family, tiny):
    model = tiny(family, n_blocks=3)
    names = [f"model.layers.{i}" for i in range(3)]
    assert BlockPlan.of(model, names[:2]).kept == ("model.layers.2",)
    with pytest.raises(ValueError, match="removes all 3 blocks; keep at least one"):
        BlockPlan.of(model, names)
