"""Every criterion returns an order of the removable blocks; the controls have their stated orders."""

import json

import pytest
import torch
from conftest import image_network

from pruning_lib.data.text import INPUTS
from pruning_lib.models import families
from pruning_lib.models.hooks import inputs_to, outputs_of, skip_block
from pruning_lib.pruning import consensus
from pruning_lib.pruning.block_ranking import CRITERIA, influence
from pruning_lib.pruning.similarity import METRICS

PUBLISHED = json.loads((INPUTS / "published_consensus_networks.json").read_text())["networks"]
IMAGES = torch.rand(90, 3, 12, 12, generator=torch.Generator().manual_seed(4))  # more than the 64 features
LABELS = torch.arange(90) % 3


def removable(model):
    return [block.name for block in families.residual_blocks(model) if block.removable]


@pytest.fixture(scope="module")
def network():
    return image_network("cifar_resnet", depth=14)


@pytest.fixture(scope="module")
def table(network):
    return consensus.scores(network, IMAGES, LABELS, progress=False)


@pytest.mark.parametrize("key", CRITERIA)
def test_an_order_has_every_block_that_can_go_once(key, network):
    found = CRITERIA[key].order(network, IMAGES, LABELS, 0)
    assert sorted(found) == removable(network) and CRITERIA[key].about


def test_consensus_is_the_rank_over_all_metrics_and_a_metric_alone_the_order_of_its_column(network, table):
    assert set(CRITERIA) == {"consensus", *METRICS, "block_influence", "loss", "front_to_back", "random"}
    assert CRITERIA["consensus"].order(network, IMAGES, LABELS, 0) == consensus.rank(table)
    for key in METRICS:
        expected = list(table[key].sort_values(kind="stable").index)
        assert CRITERIA[key].order(network, IMAGES, LABELS, 0) == expected, key
    assert len({tuple(table[key].rank()) for key in METRICS}) > 1  # the metrics do not all agree


def test_the_loss_is_that_of_the_network_with_the_block_passed_by(network):
    def loss(name):
        with skip_block(network, name), torch.no_grad():
            return torch.nn.functional.cross_entropy(network(IMAGES), LABELS).item()

    found = CRITERIA["loss"].order(network, IMAGES, LABELS, 0)
    losses = [loss(name) for name in found]
    assert losses == sorted(losses) and losses[0] < losses[-1] - 0.01
    with pytest.raises(ValueError, match="give the class of each image, or take another criterion"):
        CRITERIA["loss"].order(network, IMAGES, None, 0)


def test_block_influence_is_one_minus_the_cosine_at_every_position(network):
    name = "layer2.1"
    seen = []
    with torch.no_grad():
        with inputs_to([network.get_submodule(name)], lambda _, x: seen.append(x)):
            with outputs_of([network.get_submodule(name)], lambda _, y: seen.append(y.clone())):
                network(IMAGES)
    pairs = [(seen[0][n, :, i, j], seen[1][n, :, i, j]) for n in range(90) for i in range(6) for j in range(6)]
    slow = sum(1 - x @ y / (x.norm() * y.norm()) for x, y in pairs) / len(pairs)
    found = influence(network, IMAGES, removable(network))
    assert found[removable(network).index(name)].item() == pytest.approx(slow.item(), rel=1e-4)
    order = CRITERIA["block_influence"].order(network, IMAGES, None, 0)
    assert order == [removable(network)[i] for i in found.argsort()]


def test_block_influence_of_a_language_model_counts_tokens_and_no_padding(family, tiny):
    model = tiny(family, n_blocks=3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 77, 77]])
    names = [f"model.layers.{i}" for i in range(3)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = influence(model, [{"input_ids": ids, "attention_mask": mask}], names)
    slow = torch.zeros(3)
    for i, name in enumerate(names):
        for row, length in zip(ids, (4, 2), strict=True):
            x, y, block = {}, {}, model.get_submodule(name)
            with torch.no_grad(), inputs_to([block], x.__setitem__), outputs_of([block], y.__setitem__):
                model(row[None, :length])
            slow[i] += (1 - torch.cosine_similarity(x[0][0], y[0][0], dim=1)).sum() / 6
    torch.testing.assert_close(found.float(), slow, rtol=1e-4, atol=1e-6)


def test_front_to_back_removes_the_blocks_that_the_published_networks_lost_in_that_sequence():
    model = image_network("cifar_resnet", depth=56, shortcut="projection")
    steps = consensus.prune(model, lambda m: CRITERIA["front_to_back"].order(m, None, None, 0), rounds=21)
    published = [f"layer{1 + n['removed_stage']}.{n['removed_original_block_in_stage']}" for n in PUBLISHED[1:]]
    for step, name, wanted in zip(steps, published, PUBLISHED[1:], strict=True):
        assert step.removed == (name,)
        assert [len(stage) for stage in (step.model.layer1, step.model.layer2, step.model.layer3)] == (
            wanted["blocks_per_stage"])


def test_front_to_back_asks_for_the_first_block_of_a_stage_last(network):
    assert CRITERIA["front_to_back"].order(network, None, None, 0) == ["layer1.1", "layer2.1", "layer3.1", "layer1.0"]


def test_a_random_order_is_decided_by_the_seed_and_the_number_of_blocks_alone():
    model, fewer = (image_network("cifar_resnet", depth=depth) for depth in (26, 20))
    state = torch.get_rng_state()
    orders = [tuple(CRITERIA["random"].order(model, None, None, seed)) for seed in range(20)]
    assert orders == [tuple(CRITERIA["random"].order(model, IMAGES, LABELS, seed)) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(orders)) > 15 and len({order[0] for order in orders}) > 5
    cut = CRITERIA["random"].order(fewer, None, None, 0)
    assert [name for name in orders[0] if name in cut] != cut  # drawn anew in every round
