"""Image networks are built from a config and a seed; reading a folder restores the written network."""

import json

import pytest
import torch
from conftest import image_network, pixels
from safetensors.torch import load_file, save_file

from pruning_lib.models import image_networks, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.image_networks import ImageConfig, build


def size_of(network):
    """Width of the images of a network; most take any."""
    return network.config.arguments.get("size", 64)


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", image_networks.NETWORKS)
def test_every_network_is_built_with_finite_weights_and_classifies(name):
    network = build(ImageConfig(name, {"classes": 6}), seed=0)
    assert not network.training and {p.device.type for p in network.parameters()} == {"cpu"}
    with torch.no_grad():
        out = network(pixels(size_of(network)))
    assert out.shape == (3, 6) and out.isfinite().all() and out.std() > 0
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


def test_the_seed_alone_decides_and_nothing_is_seeded_globally():
    with torch.random.fork_rng(devices=[]):
        state = torch.manual_seed(12345).get_state()
        first, again, other = (build("cifar_resnet", seed=seed) for seed in (3, torch.Generator().manual_seed(3), 4))
        assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again) and not same(first, other)


def test_first_weights_are_as_large_as_they_should_be():
    network = build(ImageConfig("cifar_resnet", {"depth": 110}), seed=0)
    assert network.layer3[5].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert 0.11 < network.linear.weight.abs().max() <= 1 / 8 and not network.linear.bias.any()
    assert network.bn1.weight.eq(1).all() and network.bn1.running_var.eq(1).all()


def test_the_config_is_complete_whatever_was_left_out():
    config = build("cifar_resnet", seed=0).config
    assert config.arguments == {"depth": 56, "shortcut": "A", "channels": 3, "classes": 10}
    assert len(config.kept_blocks) == 27 and config.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["cifar_resnet", "resnet18", "mobilenet_v2"])
def test_pixels_are_normalised_inside(name):
    network, x = image_network(name), pixels(64)
    plain = image_networks.with_weights(ImageConfig(name, network.config.arguments, (0, 0, 0), (1, 1, 1)),
                                        network.state_dict())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (network.config.mean, network.config.std))
    with torch.no_grad():
        assert torch.equal(network(x), plain((x - mean) / std))
        assert not torch.equal(network(x), plain(x))
    assert not any("normalise" in key for key in network.state_dict())


@pytest.mark.parametrize(("config", "message"), [
    (ImageConfig("resnet"), "unknown image network 'resnet'; known: cifar_resnet, .*resnet50"),
    (ImageConfig("resnet18", {"depth": 3, "width": 2}), "resnet18 has no argument depth, width; it has classes"),
    (ImageConfig("cifar_resnet", {"channels": 1}), "images of 1 channels, mean and std have 3"),
    (ImageConfig("resnet18", {}, (0.5,), (0.5,)), "images of 3 channels, mean and std have 1"),
    (ImageConfig("cifar_resnet", {"depth": 8}, kept_blocks=["layer1.0", "layer3.0"]), "layer2.0 cannot be removed"),
    (ImageConfig("cifar_resnet", {"depth": 8}, kept_blocks=["layer1.1", "layer2.0", "layer3.0"]), "its own order"),
    (ImageConfig("cifar_resnet", {"depth": 8}, kept_blocks=["layer2.0", "layer1.0", "layer3.0"]), "its own order"),
])
def test_what_is_no_network_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(config, seed=0)


def test_a_network_made_with_fewer_blocks_is_the_one_cut_to_them():
    kept = ("layer1.1", "layer2.0", "layer2.2", "layer3.0")
    network = build(ImageConfig("cifar_resnet", {"depth": 20}, kept_blocks=kept), seed=0)
    assert network.config.kept_blocks == kept
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3)] == [1, 2, 1]


@pytest.mark.parametrize("name", image_networks.NETWORKS)
def test_written_cut_and_read_again_and_again(name, tmp_path):
    network = image_network(name, classes=4)
    for step in range(2):
        blocks = [b.name for b in BlockPlan.of(network, ()).blocks if b.removable]
        network = surgery.remove(network, BlockPlan.of(network, [blocks[step]]))
        folder = tmp_path / str(step)
        folder.mkdir()
        image_networks.write(network, folder)
        assert image_networks.is_image_network(folder)
        again = image_networks.read(folder)
        assert same(network, again) and again.config == network.config and not again.training
        with torch.no_grad():
            assert torch.equal(network(pixels(size_of(network))[:1]), again(pixels(size_of(network))[:1]))
        assert all(p.requires_grad for p in again.parameters())
        network = again
    with torch.device("meta"):
        whole = image_networks.NETWORKS[name](classes=4)
    assert len(network.config.kept_blocks) == len(BlockPlan.of(whole, ()).blocks) - 2


def test_the_precision_of_the_weights_is_kept(tmp_path):
    network = image_network("cifar_resnet", depth=8).to(torch.bfloat16)
    image_networks.write(network, tmp_path)
    again = image_networks.read(tmp_path)
    with torch.no_grad():
        assert torch.equal(network(pixels(dtype=torch.bfloat16)), again(pixels(dtype=torch.bfloat16)))


@pytest.fixture
def folder(tmp_path):
    image_networks.write(image_network("cifar_resnet", depth=8), tmp_path)
    return tmp_path


@pytest.mark.parametrize(("change", "message"), [
    ({"format_version": 3}, "not of format version 1 or 2; update"),
    ({"colour": "blue"}, "does not describe an image network.*colour"),
    ({"network": "resnet9"}, "unknown image network 'resnet9'; known"),
    ({"kept_blocks": ["layer1.0", "layer4.0"]}, "kept_blocks: layer1.0, layer4.0.*must be blocks of cifar_resnet"),
    ({"arguments": {"depth": 8, "classes": 11}}, "weights are not those of cifar_resnet with.*11(?s:.*)size mismatch"),
])
def test_a_config_that_does_not_fit_is_refused(folder, change, message):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(ValueError, match=message):
        image_networks.read(folder)


def test_broken_files_are_named(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read.*delete it"):
        image_networks.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a JSON object.*delete it"):
        image_networks.is_image_network(folder)


@pytest.mark.parametrize("arguments", [
    {"depth": 20}, {"depth": 14, "shortcut": "projection", "classes": 100}])
def test_weights_alone_are_enough_for_a_cifar_resnet(tmp_path, arguments):
    """Write weights in the published format: no config, no counters of batches."""
    network = image_network("cifar_resnet", mean=image_networks.IMAGENET_MEAN, std=image_networks.IMAGENET_STD,
                            **arguments)
    weights = {name: t for name, t in network.state_dict().items() if "num_batches" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    again = image_networks.read(tmp_path) if image_networks.is_image_network(tmp_path) else None
    assert again.config == network.config
    with torch.no_grad():
        assert torch.equal(network(pixels()), again(pixels()))
    weights["linear.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weights are not those of(?s:.*)linear.extra"):
        image_networks.read(tmp_path)


def test_weights_of_a_pruned_network_alone_are_not_enough(tmp_path):
    network = image_network("cifar_resnet", depth=20)
    image_networks.write(surgery.remove(network, BlockPlan.of(network, ["layer1.1"])), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="stages of 2, 3, 3 blocks and no config.json"):
        image_networks.read(tmp_path)


def test_other_folders_are_not_ours(tmp_path, tiny):
    assert not image_networks.is_image_network(tmp_path)
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert not image_networks.is_image_network(tmp_path)
    tiny("llama").save_pretrained(tmp_path / "llama")
    assert not image_networks.is_image_network(tmp_path / "llama")


def test_the_folder_says_in_plain_words_what_it_is(folder):
    described = json.loads((folder / "config.json").read_text())
    assert described["format"] == "pruning_lib image network" and described["format_version"] == 1
    assert described["arguments"]["depth"] == 8 and described["mean"] == [0.4, 0.5, 0.3]
    assert described["kept_blocks"] == ["layer1.0", "layer2.0", "layer3.0"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(folder / "model.safetensors")) == set(image_networks.read(folder).state_dict())
