"""Representations without a block equal those with the block skipped; scores, ranks, orders and rounds."""

import copy
import math

import pandas as pd
import pytest
import torch
from conftest import hooks_of, image_network, pixels

from pruning_lib.models import families, image_networks
from pruning_lib.models.hooks import inputs_to, skip_block
from pruning_lib.pruning import consensus, similarity
from pruning_lib.pruning.similarity import METRICS
from pruning_lib.training.sgd import recalibrate_batchnorm

NETWORKS = {"cifar": ("cifar_resnet", {"depth": 14}),
            "projection": ("cifar_resnet", {"depth": 20, "shortcut": "projection"}),
            "torchvision": ("resnet18", {"classes": 4}), "bottleneck": ("resnet50", {"classes": 4}),
            "mobilenet": ("mobilenet_v2", {"classes": 4})}
N = 90  # linear_shape_0 needs more images than the 64 features


def network(key="cifar"):
    name, arguments = NETWORKS[key]
    return image_network(name, **arguments)


def labelled_images():
    """Return small images of three classes."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(N, 3, 12, 12, generator=generator), torch.arange(N) % 3


def prompt_batches(prompts):
    """Return two batches, each padded on the right to its longest prompt."""
    for some in (prompts[:3], prompts[3:]):
        width = max(map(len, some))
        rows = [ids + [0] * (width - len(ids)) for ids in some]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in some]
        yield {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def removable(model):
    return [block.name for block in families.residual_blocks(model) if block.removable]


def state_of(model):
    """Return all state that must be unchanged afterwards: modes, attributes, weights, statistics."""
    modules = {name: (module.training, set(vars(module))) for name, module in model.named_modules()}
    return modules, copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    modules, weights = before
    assert {name: (module.training, set(vars(module))) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not hooks_of(model)


# --- representations --------------------------------------------------------------------------------------------------


def entering_the_classifier(model, *args, **named):
    caught = {}
    with torch.inference_mode(), inputs_to([families.classifier(model)], caught.__setitem__):
        model(*args, **named)
    return caught[0]


@pytest.mark.parametrize("key", NETWORKS)
def test_without_a_block_an_image_network_says_what_it_says_with_the_block_bypassed(key):
    data = pixels()
    model = recalibrate_batchnorm(network(key), data)  # else blocks of MobileNetV2 add too little
    whole, without = consensus.representations(model, data, progress=False)
    assert torch.equal(whole, entering_the_classifier(model, data))
    assert whole.dtype == torch.float32 and len(without) == len(removable(model)) > 3
    for name, found in zip(removable(model), without, strict=True):
        with skip_block(model, name):
            assert torch.equal(found, entering_the_classifier(model, data)), name
        assert (found - whole).abs().max() > 1e-3


def test_without_a_block_a_language_model_says_what_it_says_with_the_block_bypassed(family, tiny, prompts):
    """Take the last token of every prompt, independent of the padding behind it."""
    model, batches = tiny(family, n_blocks=3), list(prompt_batches(prompts))

    def last_tokens():
        rows = []
        for batch in batches:
            hidden = entering_the_classifier(model, **batch)
            rows += [row[mask.sum() - 1] for row, mask in zip(hidden, batch["attention_mask"], strict=True)]
        return torch.stack(rows)

    whole, without = consensus.representations(model, iter(batches), progress=False)
    assert torch.equal(whole, last_tokens()) and without.shape == (3, 4, 48)
    for name, found in zip(removable(model), without, strict=True):
        with skip_block(model, name):
            assert torch.equal(found, last_tokens()), name
    alone = [entering_the_classifier(model, torch.tensor([ids]))[0, -1] for ids in prompts]
    torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_only_what_stands_behind_the_block_left_out_runs_again(tiny, prompts):
    """Count the runs of each block for two batches: one full pass, and one per skipped block before it."""
    for model, inputs in ((network(), list(pixels()[:2].split(1))),
                          (tiny("llama", n_blocks=4), list(prompt_batches(prompts)))):
        ran, infos = [], families.residual_blocks(model)
        parts = {info.name: list(model.get_submodule(info.name).children()) for info in infos}
        for part in sum(parts.values(), []):
            part.register_forward_hook(lambda part, *_, ran=ran: ran.append(part))
        consensus.representations(model, inputs, progress=False)
        before = 0
        for info in infos:
            assert {ran.count(part) for part in parts[info.name]} == {2 * (1 + before)}, info.name
            before += info.removable
        assert before > 3


def test_the_blocks_asked_for_come_in_the_order_asked_for_and_batches_do_not_matter():
    model, (data, _) = network(), labelled_images()
    whole, without = consensus.representations(model, data[:7], progress=False)
    names = removable(model)
    one, (last, first) = consensus.representations(model, data[:7], [names[3], names[0]], images_per_batch=3,
                                                   progress=False)
    for found, expected in ((one, whole), (last, without[3]), (first, without[0])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_model_is_as_it_was_even_when_a_pass_fails(tiny, prompts, wrong):
    image, language = network(), tiny("qwen2", n_blocks=3)
    cases = [(image, pixels(channels=1 + 3 * wrong) if wrong else pixels()),
             (language, [{**batch, "input_ids": batch["input_ids"] + 10_000 * wrong}
                         for batch in prompt_batches(prompts)])]
    for model, inputs in cases:
        model.train()
        list(model.children())[0].eval()  # a frozen part
        before = state_of(model)
        if wrong:
            with pytest.raises((ValueError, IndexError)):
                consensus.representations(model, inputs, progress=False)
        else:
            assert torch.equal(*(consensus.representations(model, inputs, progress=False)[0] for _ in range(2)))
        assert_untouched(model, before)


def test_what_has_no_representation_is_refused():
    model = network()
    with pytest.raises(ValueError, match="no inputs.*at least two"):
        consensus.representations(model, [], progress=False)
    with pytest.raises(ValueError, match=r"torch.int64; give uint8, or floats in \[0, 1\]"):
        consensus.representations(model, (pixels() * 255).long(), progress=False)
    for name in ("layer2.0", "layer9.9"):
        with pytest.raises(ValueError, match=f"{name}.*removable: layer1.0, layer1.1, layer2.1, layer3.1"):
            consensus.representations(model, pixels(), [name], progress=False)
    assert not hooks_of(model)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored():
    model = network()
    return model, consensus.scores(model, *labelled_images(), progress=False)


def test_scores_are_a_line_per_block_and_a_column_per_metric_with_the_numbers_of_each_pair(scored):
    model, table = scored
    data, labels = labelled_images()
    assert list(table.index) == removable(model) and table.index.name == "block"
    assert list(table.columns) == list(METRICS)
    whole, without = consensus.representations(model, data, progress=False)
    for key in METRICS:
        expected = [METRICS[key].distance(whole, found, labels) for found in without]
        assert table[key].tolist() == pytest.approx(expected, rel=1e-9), key


def test_the_metrics_asked_for_are_the_columns_in_that_order(scored):
    model, table = scored
    found = consensus.scores(model, *labelled_images(), metrics=["wasserstein", "cka"], progress=False)
    pd.testing.assert_frame_equal(found, table[["wasserstein", "cka"]])


def test_without_labels_the_metrics_that_need_none_remain(scored):
    model, table = scored
    data, _ = labelled_images()
    need_none = [key for key in METRICS if not METRICS[key].needs_labels]
    pd.testing.assert_frame_equal(consensus.scores(model, data, progress=False), table[need_none])
    with pytest.raises(ValueError, match="gaussian_1, gaussian_2 compare classes: give labels, or leave"):
        consensus.scores(model, data, metrics=["cka", "gaussian_1", "gaussian_2"])
    with pytest.raises(ValueError, match="unknown metric 'cca'; known: .*cka"):
        consensus.scores(model, data, metrics=["cca"])


def test_a_metric_that_too_few_images_say_nothing_to_is_left_out_with_a_warning_unless_asked_for():
    model, (images, labels) = network(), labelled_images()
    few = consensus.representations(model, images[:1])[0].shape[1] + 1
    with pytest.warns(UserWarning, match=f"linear_shape_0 left out: {few} samples of {few - 1} features"):
        table = consensus.scores(model, images[:few], labels[:few])
    assert list(table) == [name for name in METRICS if name != "linear_shape_0"]
    assert "linear_shape_0" in consensus.scores(model, images[:few + 1], labels[:few + 1])
    with pytest.raises(ValueError, match="more samples"):
        consensus.scores(model, images[:20], labels[:20], metrics=["linear_shape_0"])


def test_the_order_of_the_images_does_not_matter(scored):
    model, table = scored
    data, labels = labelled_images()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    again = consensus.scores(model, data[order], labels[order], progress=False)
    pd.testing.assert_frame_equal(again, table, rtol=1e-3)
    assert consensus.rank(again) == consensus.rank(table)


def test_a_block_that_adds_nothing_is_at_no_distance_and_goes_first_by_every_metric():
    model = network()
    for tensor in (model.layer2[1].bn2.weight, model.layer2[1].bn2.bias):
        tensor.data.zero_()
    table = consensus.scores(model, *labelled_images(), progress=False)
    assert table.loc["layer2.1"].max() < 2e-6
    assert (table.drop(index="layer2.1") > 1e-4).all(axis=None)
    assert (consensus.ranks(table).loc["layer2.1"] == 0).all() and consensus.rank(table)[0] == "layer2.1"


def test_a_language_model_is_scored_on_its_prompts(tiny):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (12, 6), generator=generator) for _ in range(2)]
    batches = [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in ids]
    table = consensus.scores(tiny("llama", n_blocks=3), batches, metrics=["cka", "linear_shape_1"], progress=False)
    assert table.shape == (3, 2) and (table > 1e-4).all(axis=None)


def test_a_network_in_which_every_block_changes_the_shape_has_no_scores():
    config = image_networks.ImageConfig("cifar_resnet", {"depth": 8}, kept_blocks=("layer2.0", "layer3.0"))
    with pytest.raises(ValueError, match="no block of this network keeps the shape"):
        consensus.scores(image_networks.build(config, seed=0), *labelled_images())


# --- ranks ------------------------------------------------------------------------------------------------------------


TABLE = pd.DataFrame({"p": [0.1, 0.1, 0.3, 0.4], "q": [0.4, 0.3, 0.2, 0.1], "r": [500.0, 1.0, 200.0, 300.0]},
                     index=["b0", "b1", "b2", "b3"])


def test_ranks_are_those_worked_out_by_hand():
    expected = pd.DataFrame({"p": [0.5, 0.5, 2, 3], "q": [3.0, 2, 1, 0], "r": [3.0, 0, 1, 2]}, index=TABLE.index)
    pd.testing.assert_frame_equal(consensus.ranks(TABLE), expected)


def test_the_smallest_sum_of_ranks_goes_first():
    """Rank by the sums 6.5, 2.5, 4 and 5; by sums of distances b1 would be first too, but b3 last."""
    assert consensus.rank(TABLE) == ["b1", "b2", "b3", "b0"]


def test_blocks_of_equal_sums_stay_in_the_order_of_the_table():
    table = pd.DataFrame({"p": [3.0, 1, 0, 2], "q": [0.0, 2, 3, 1]}, index=["b3", "b0", "b2", "b1"])
    assert consensus.rank(table) == ["b3", "b0", "b2", "b1"]


def test_a_missing_score_is_no_rank():
    table = TABLE.copy()
    table.loc["b2", "q"] = math.nan
    for judge in (consensus.ranks, consensus.rank):
        with pytest.raises(ValueError, match="a score is missing"):
            judge(table)


# --- prune ------------------------------------------------------------------------------------------------------------


def front_to_back(model):
    return removable(model)


def per_stage(model):
    return [len(stage) for stage in (model.layer1, model.layer2, model.layer3)]


def test_names_are_those_of_the_network_pruning_began_with():
    """Report original names: in round 2 ``layer1.0`` is the former ``layer1.1``; a stage keeps its last block."""
    model = image_network("cifar_resnet", depth=20)
    before = state_of(model)
    steps = list(consensus.prune(model, front_to_back, rounds=6, min_blocks=1))
    assert [step.removed for step in steps] == [
        ("layer1.0",), ("layer1.1",), ("layer2.1",), ("layer2.2",), ("layer3.1",), ("layer3.2",)]
    assert steps[1].order[:2] == ("layer1.0", "layer1.1")
    assert [per_stage(step.model) for step in steps] == [
        [2, 3, 3], [1, 3, 3], [1, 2, 3], [1, 1, 3], [1, 1, 2], [1, 1, 1]]
    assert steps[3].model.config.kept_blocks == ("layer1.2", "layer2.0", "layer3.0", "layer3.1", "layer3.2")
    assert torch.equal(steps[5].model.layer1[0].conv2.weight, model.layer1[2].conv2.weight)
    assert_untouched(model, before)
    assert per_stage(model) == [3, 3, 3]


def test_several_blocks_may_go_at_once_and_every_stage_keeps_two():
    model = image_network("cifar_resnet", depth=26)
    steps = list(consensus.prune(model, lambda m: removable(m)[::-1], rounds=2, per_round=3))
    assert [set(step.removed) for step in steps] == [
        {"layer3.3", "layer3.2", "layer2.3"}, {"layer2.2", "layer1.3", "layer1.2"}]
    assert [per_stage(step.model) for step in steps] == [[4, 3, 2], [2, 2, 2]]


def test_blocks_of_a_language_model_keep_their_numbers(tiny):
    model = tiny("llama", n_blocks=4)
    steps = list(consensus.prune(model, lambda m: removable(m)[1:], rounds=2))
    assert [step.removed for step in steps] == [("model.layers.1",), ("model.layers.2",)]
    assert len(families.blocks(steps[-1].model)) == 2 and len(families.blocks(model)) == 4


@pytest.mark.parametrize(("asked", "message"), [
    ({"rounds": 4}, "4 rounds of 1 blocks; 3 blocks can be removed if each stage keeps 2"),
    ({"rounds": 2, "per_round": 2}, "2 rounds of 2 blocks; 3 blocks can be removed"),
    ({"rounds": 7, "min_blocks": 1}, "7 rounds of 1 blocks; 6 blocks can be removed if each stage keeps 1"),
    ({"rounds": 1, "min_blocks": 3}, "0 blocks can be removed"), ({"rounds": 0}, "0 rounds of 1"),
    ({"rounds": 1, "min_blocks": 0}, "min_blocks=0; a stage keeps at least 1")])
def test_more_than_can_go_is_refused_before_anything_is_done(asked, message):
    """Refuse at the call itself, not at the first step."""
    def criterion(model):
        raise AssertionError("asked")

    with pytest.raises(ValueError, match=message):
        consensus.prune(image_network("cifar_resnet", depth=20), criterion, **asked)


def test_an_order_that_leaves_too_little_to_remove_is_refused():
    model = image_network("cifar_resnet", depth=20)
    with pytest.raises(ValueError, match="count=2, but only 1 blocks .* can be removed if each stage keeps 2"):
        list(consensus.prune(model, lambda m: ["layer1.0", "layer1.1"], rounds=1, per_round=2))


def test_what_is_tuned_in_between_is_what_the_next_round_sees_and_cuts():
    asked = []

    def criterion(model):
        asked.append(model)
        return front_to_back(model)

    model = tuned = image_network("cifar_resnet", depth=20)
    for i, step in enumerate(consensus.prune(model, criterion, rounds=3)):
        assert len(asked) == i + 1  # the generator is lazy
        assert asked[-1] is tuned
        assert step.model.linear.bias[0] == (0 if i == 0 else 10 * i)
        tuned = step.model
        tuned.linear.bias.data[0] = 10 * (i + 1)
    assert model.linear.bias[0] == 0


# --- inputs in every form ---------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        return self.images[i], int(self.labels[i])


FORMS = {
    "one pair": lambda x, y: (x, y),
    "uint8": lambda x, y: ((x * 255).byte(), y),
    "data set": lambda x, y: Pairs(x, y),
    "loader": lambda x, y: torch.utils.data.DataLoader(Pairs(x, y), batch_size=32),
    "list of pairs": lambda x, y: list(zip(x.split(40), y.split(40), strict=True)),
    "dicts": lambda x, y: [{"pixel_values": a, "labels": b} for a, b in zip(x.split(40), y.split(40), strict=True)],
    "generator": lambda x, y: ((a, b[:, None].float()) for a, b in zip(x.split(40), y.split(40), strict=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels_may_come_in_every_form(form, scored):
    model, table = scored
    data, labels = labelled_images()
    if form == "uint8":
        data = (data * 255).byte() / 255
        table = consensus.scores(model, data, labels, metrics=["cka", "gaussian_2"], progress=False)
    found = consensus.scores(model, FORMS[form](data, labels), metrics=["cka", "gaussian_2"], progress=False)
    pd.testing.assert_frame_equal(found, table[["cka", "gaussian_2"]], rtol=1e-4)


def test_a_folder_of_pictures_is_scored(tmp_path):
    from PIL import Image
    from torchvision.datasets import ImageFolder

    data, labels = labelled_images()
    for i, (image, label) in enumerate(zip(data[:30], labels[:30], strict=True)):
        (tmp_path / str(int(label))).mkdir(exist_ok=True)
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / str(int(label)) / f"{i:02}.png")
    order = [i for label in range(3) for i in range(label, 30, 3)]
    found = consensus.scores(network(), ImageFolder(tmp_path), metrics=["cka", "gaussian_2"], progress=False)
    expected = consensus.scores(network(), (data[order] * 255).byte(), labels[order], metrics=["cka", "gaussian_2"],
                                progress=False)
    pd.testing.assert_frame_equal(found, expected)


def test_a_registered_metric_does_not_join_consensus(scored, monkeypatch):
    """Consensus means the eight metrics of the paper, by name."""
    model, table = scored
    monkeypatch.setitem(METRICS, "mine", METRICS["cka"])
    assert list(table.columns) == list(similarity.PAPER_METRICS) and len(similarity.PAPER_METRICS) == 8
    few = [similarity.PAPER_METRICS, ["mine"]]
    found = [consensus.scores(model, *labelled_images(), progress=False, **more)
             for more in ({}, {"metrics": few[1]})]
    assert list(found[0]) == list(few[0]) and list(found[1]) == ["mine"]
    x, labels = torch.randn(20, 3), torch.arange(20) % 2
    assert list(similarity.distances(x, [x], labels)) == list(similarity.PAPER_METRICS)


def test_a_transformer_is_scored_block_by_block_and_branch_by_branch():
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 3, 2, 12, 24, num_classes=3).eval()
    data, labels = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    table = consensus.scores(model, data, labels, metrics=["cka", "wasserstein"], progress=False)
    assert table.shape == (3, 2) and (table > 0).all(axis=None)
    image_networks.describe(model, branches=True)
    parts = consensus.scores(model, data, labels, metrics=["cka"], progress=False)
    assert len(parts) == 6 and (parts > 0).all(axis=None)
    step = consensus.step(model, lambda m: consensus.rank(parts), min_blocks=1)
    assert step.removed == (consensus.rank(parts)[0],)


def test_the_order_is_that_of_the_ranks_of_a_table_with_ties():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randint(4, (5, 7), generator=generator).double()
        table = pd.DataFrame(rows.T.numpy(), index=[f"block {i}" for i in range(7)])
        by_pandas = list((table.rank(method="average") - 1).sum(axis=1).sort_values(kind="stable").index)
        assert consensus.in_order(list(table.index), list(rows)) == consensus.rank(table) == by_pandas
