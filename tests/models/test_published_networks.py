"""Published networks load by name from their files; without the files the error says where the authors' are."""

import os

import pytest
import torch
from safetensors.torch import save_file
from test_keras_resnet import keras_network

from pruning_lib.data import images
from pruning_lib.evaluation import quality
from pruning_lib.models import loading, published_networks

LENT = {name: os.environ.get(name) for name in ("PRUNING_MODELS", "PRUNING_DATA")}  # a fixture hides them
HAVE = all(LENT.values()) and os.path.isdir(os.path.join(str(LENT["PRUNING_DATA"]), "cifar10")) and os.path.isdir(
    os.path.join(str(LENT["PRUNING_MODELS"]), "cifar10-resnet32"))
# top-1 on the 10,000 original test images: of the published networks as their files give it, of the dense ones as
# their author states it
ACCURACY = {"published-resnet56/consensus-00": 0.9229, "published-resnet56/consensus-21": 0.9172,
            "published-resnet56/cka-10": 0.9355, "published-resnet56/cka-20": 0.9238,
            "cifar10-resnet20": 0.9173, "cifar10-resnet32": 0.9263, "cifar10-resnet44": 0.9310,
            "cifar10-resnet56": 0.9339}


def put(folder, name, network):
    """Write the files of a network as somebody would who converted the authors' ones."""
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file({"pixel_mean": weights.pop("pixel_mean.mean")}, folder / "pixel_mean.safetensors")
    save_file(weights, folder / f"{name}.safetensors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PRUNING_MODELS", str(tmp_path))
    (tmp_path / "published-resnet56").mkdir()
    return tmp_path / "published-resnet56"


def test_a_network_is_loaded_by_name_from_its_two_files(folder):
    network = keras_network(blocks=(2, 2, 2))
    put(folder, "consensus-21", network)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    for _ in range(2):  # converted, then read from the cache
        found, tokenizer = loading.load_model("published-resnet56/consensus-21", device="cpu")
        with torch.no_grad():
            assert torch.equal(found(pixels), network(pixels)) and tokenizer is None


def test_a_file_with_another_number_of_blocks_than_its_name_says_is_refused(folder):
    put(folder, "cka-10", keras_network(blocks=(2, 2, 2)))
    with pytest.raises(ValueError, match=r"cka-10.safetensors has 6 blocks, wanted 17"):
        loading.load_model("published-resnet56/cka-10")
    assert not (folder.parent / "cache" / "models" / "published-resnet56" / "cka-10").exists()


@pytest.mark.parametrize("name, address", [("consensus-10", "CarolinaTavaresDuarte/Consensus-Layer-Pruning"),
                                           ("cka-20", "IanPons/CKA-Layer-Pruning")])
def test_without_the_files_the_error_says_where_the_authors_files_are(folder, name, address):
    with pytest.raises(ConnectionError, match=rf"(?s){name}.safetensors.*{address}.*PRUNING_MODELS"):
        loading.load_model(f"published-resnet56/{name}")


def test_every_name_says_how_many_blocks_are_gone():
    assert all(name == f"published-resnet56/{e.criterion}-{e.removed_blocks:02}" and loading.MODELS[name] is e
               for name, e in published_networks.NETWORKS.items())
    assert len(published_networks.NETWORKS) == 20


@pytest.mark.skipif(not HAVE, reason="set PRUNING_DATA and PRUNING_MODELS to folders with the data and the networks")
@pytest.mark.parametrize("name", ACCURACY)
def test_the_accuracy_on_all_test_images_is_the_one_stated(name, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    for variable, value in LENT.items():
        monkeypatch.setenv(variable, value)
    network, _ = loading.load_model(name, device="cpu")
    found = quality.accuracy(network, *images.load("cifar10", "test"))[0]["accuracy_fraction"]
    assert found == pytest.approx(ACCURACY[name], abs=1.5e-4)  # rounding may flip an image
