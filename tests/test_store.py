"""What was made once is read again, bit for bit; what was interrupted or damaged is made again or named."""

import pytest
import torch
from conftest import image_network, pixels

from pruning_lib import store


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))


def make():
    return image_network("cifar_resnet", depth=8), {"seconds": 1.5, "answers": "8:ab"}


def never():
    raise AssertionError("made again")


def test_it_is_made_once_and_found_again_by_its_key():
    first = store.made(make, seed=0, image_set="digits")
    again = store.made(never, image_set="digits", seed=0)
    assert first.key == again.key and again.facts == {"seconds": 1.5, "answers": "8:ab"}
    found = store.find(first.key).network
    assert not found.training and torch.equal(found(pixels()), make()[0](pixels()))


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 0.5}, {"seed": 0, "lr": 0.1}, {"seed": "0"}])
def test_other_settings_are_another_network(other):
    assert store.made(make, **other).key != store.made(make, seed=0).key


def test_a_run_of_other_settings_inside_settings_is_another_network():
    assert store.made(make, start={"seed": 0}).key != store.made(make, start={"seed": 1}).key


def test_interrupted_it_leaves_nothing_behind(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.made(interrupted, seed=0)
    assert store.made(make, seed=0).facts["seconds"] == 1.5
    assert [p.name for p in (tmp_path / "made").iterdir()] == [store.made(never, seed=0).key]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(store.networks, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.made(make, seed=0)
    assert not list((tmp_path / "made").iterdir())


def test_who_comes_second_gets_the_network_of_the_first():
    def slower():
        store.made(make, seed=0)
        network, _ = make()
        torch.nn.init.zeros_(network.linear.weight)
        return network, {"seconds": 9.0, "answers": ""}

    made = store.made(slower, seed=0)
    assert made.facts["seconds"] == 1.5 and made.network.linear.weight.any()


@pytest.mark.parametrize("file, content", [
    ("facts.json", "{"), ("model.safetensors", "no tensors"), ("config.json", "{")])
def test_what_cannot_be_read_is_named(tmp_path, file, content):
    key = store.made(make, seed=0).key
    (tmp_path / "made" / key / file).write_text(content)
    with pytest.raises(ValueError, match=f"{key}.*delete it"):
        store.made(never, seed=0)


def test_an_unknown_key_says_who_makes_the_network():
    with pytest.raises(ValueError, match="no network 0123.*pruning-lib run"):
        store.find("0123")


def test_a_digest_tells_weights_apart_and_nothing_else():
    network = image_network("cifar_resnet", depth=8)
    before = store.digest(network)
    assert store.digest(network.train().to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        network.bn1.running_mean[3] += 1e-6
    assert store.digest(network) != before
    assert store.digest(network.double()) != store.digest(network.float())
