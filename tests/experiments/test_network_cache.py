"""Cached networks are read again bit for bit; interrupted or corrupt entries are rebuilt or reported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_network, pixels
from two_processes import check_that_the_second_waits

from pruning_lib.evaluation import cost
from pruning_lib.experiments import network_cache
from pruning_lib.models import families


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))


def make():
    return image_network("cifar_resnet", depth=8), {"seconds": 1.5, "answers": "8:ab"}


def never():
    raise AssertionError("made again")


def test_it_is_made_once_and_found_again_by_its_key():
    first = network_cache.get_or_train(make, seed=0, image_set="digits")
    again = network_cache.get_or_train(never, image_set="digits", seed=0)
    assert first.key == again.key and again.facts == {"seconds": 1.5, "answers": "8:ab"}
    found = network_cache.find(first.key).network
    assert not found.training and torch.equal(found(pixels()), make()[0](pixels()))


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 0.5}, {"seed": 0, "lr": 0.1}, {"seed": "0"}])
def test_other_settings_are_another_network(other):
    assert network_cache.get_or_train(make, **other).key != network_cache.get_or_train(make, seed=0).key


def test_a_run_of_other_settings_inside_settings_is_another_network():
    first, second = (network_cache.get_or_train(make, start={"seed": seed}) for seed in (0, 1))
    assert first.key != second.key


def test_interrupted_it_leaves_nothing_behind(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        network_cache.get_or_train(interrupted, seed=0)
    assert network_cache.get_or_train(make, seed=0).facts["seconds"] == 1.5
    assert [p.name for p in (tmp_path / "made").iterdir()] == [network_cache.get_or_train(never, seed=0).key]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(network_cache.image_networks, "write", full)
    with pytest.raises(OSError, match="No space"):
        network_cache.get_or_train(make, seed=0)
    assert not list((tmp_path / "made").iterdir())


def test_who_comes_second_gets_the_network_of_the_first():
    def slower():
        network_cache.get_or_train(make, seed=0)
        network, _ = make()
        torch.nn.init.zeros_(network.linear.weight)
        return network, {"seconds": 9.0, "answers": ""}

    made = network_cache.get_or_train(slower, seed=0)
    assert made.facts["seconds"] == 1.5 and made.network.linear.weight.any()


@pytest.mark.parametrize("file, content", [
    ("facts.json", "{"), ("model.safetensors", "no tensors"), ("config.json", "{")])
def test_what_cannot_be_read_is_named(tmp_path, file, content):
    key = network_cache.get_or_train(make, seed=0).key
    (tmp_path / "made" / key / file).write_text(content)
    with pytest.raises(ValueError, match=f"{key}.*delete it"):
        network_cache.get_or_train(never, seed=0)


def test_answers_are_asked_for_once_and_damage_is_named(tmp_path):
    right = [np.array([True, False, True]), np.array([False] * 3)]
    for ask in (lambda: right, never):
        found = network_cache.cached_predictions(ask, network="a", epsilons=[0.1, 0.2])
        assert [r.tolist() for r in found] == [r.tolist() for r in right]
    [kept] = (tmp_path / "answered").iterdir()
    kept.write_text(kept.read_text()[:40])
    with pytest.raises(ValueError, match=rf"{kept} cannot be read .* delete it"):
        network_cache.cached_predictions(never, network="a", epsilons=[0.1, 0.2])
    with pytest.raises(AssertionError, match="made again"):
        network_cache.cached_predictions(never, network="b", epsilons=[0.1, 0.2])
    assert [path.name for path in (tmp_path / "answered").iterdir()] == [kept.name]


def test_an_unknown_key_says_who_makes_the_network():
    with pytest.raises(ValueError, match="no network 0123.*pruning-lib run"):
        network_cache.find("0123")


def test_a_digest_tells_weights_apart_and_nothing_else():
    network = image_network("cifar_resnet", depth=8)
    before = network_cache.digest_of(network)
    assert network_cache.digest_of(network.train().to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        network.bn1.running_mean[3] += 1e-6
    assert network_cache.digest_of(network) != before
    assert network_cache.digest_of(network.double()) != network_cache.digest_of(network.float())


@pytest.mark.parametrize("first_dies", [False, True])
def test_of_two_processes_that_want_it_the_second_waits_and_makes_it_only_if_the_first_dies(tmp_path, first_dies):
    check_that_the_second_waits(lambda by: network_cache.get_or_train(
        lambda: (make()[0], {"by": by()}), seed=0).facts["by"], tmp_path, first_dies=first_dies)
    assert len(list((tmp_path / "made").iterdir())) == 1


@pytest.mark.parametrize("key", ["../facts", "/etc", "a" * 15, ""])
def test_a_key_from_a_record_cannot_lead_out_of_the_cache(tmp_path, key):
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match="no network"):
        network_cache.find(key)


def test_a_network_may_come_with_the_records(tmp_path, monkeypatch):
    made = network_cache.get_or_train(make, seed=0)
    (tmp_path / "networks").mkdir()
    (tmp_path / "made" / made.key).rename(tmp_path / "networks" / made.key)
    with pytest.raises(ValueError, match="no network"):
        network_cache.find(made.key)
    monkeypatch.setenv("PRUNING_RECORDS", str(tmp_path / "results"))
    assert network_cache.digest_of(network_cache.find(made.key).network) == network_cache.digest_of(made.network)


ROOT = Path(__file__).parents[2]
COME_WITH = sorted(p.name for p in (ROOT / "data" / "networks").glob("*"))


@pytest.mark.parametrize("key", COME_WITH)
def test_networks_that_come_with_the_book_are_of_the_size_their_records_say(key, monkeypatch):
    monkeypatch.setenv("PRUNING_RECORDS", str(ROOT / "data" / "results"))
    network = network_cache.find(key).network
    named = [row for path in (ROOT / "data" / "results").glob("consensus-*.json")
             for row in json.loads(path.read_text())["rows"] if row.get("key") == key]
    assert {(row["macs"], row["parameters"]) for row in named} == {
        (cost.macs(network, torch.zeros(1, 3, 32, 32)), families.parameter_count(network))}
