"""Networks that see a cue from the first step: dense and pruned ones learn from the same images, equally long."""

import pytest
import torch

from pruning_lib.data import images
from pruning_lib.evaluation.spurious_cues import inject_cue
from pruning_lib.experiments.cued_networks import Schedule, train_and_prune
from pruning_lib.models import image_networks
from pruning_lib.training import sgd

SCHEDULE = Schedule("digits", "tint", 0.9, 256, 1.0, 4, 0.25, 1.0, per_class=2)  # 4 of 9 blocks


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    return tmp_path


def test_the_dense_network_is_the_one_that_training_by_hand_on_marked_images_gives():
    """The truth: three calls of the trainer, on images marked once."""
    x, y = images.load("digits", "train", 256)
    entry = images.IMAGES["digits"]
    config = image_networks.ImageConfig("cifar_resnet", {"depth": 20, "channels": 1}, entry.mean, entry.std)
    network, marked = image_networks.build(config, seed=3), inject_cue(x, y, cue="tint", agreement=0.9, seed=3)
    for number, (epochs, lr) in enumerate([(1.0, 0.1), *[(0.25, 0.02)] * 4, (1.0, 0.02)]):
        sgd.train(network, marked, y, epochs=epochs, lr=lr, seed=3000 + number, augment=False, dtype="float32")
    dense, = train_and_prune(["none"], SCHEDULE, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), dense.network.state_dict().values(),
                                                 strict=True))


def test_a_criterion_removes_its_blocks_and_each_network_is_made_once(own_cache):
    names = ["none", "front_to_back"]
    dense, pruned = train_and_prune(names, SCHEDULE, seed=0)
    whole, kept = (set(subject.network.config.kept_blocks) for subject in (dense, pruned))
    assert kept < whole and len(whole - kept) == pruned.removed_blocks == 4 and dense.removed_blocks == 0
    files = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()}
    again = train_and_prune(names, SCHEDULE, seed=0)
    assert [other.key for other in again] == [dense.key, pruned.key]
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()} == files
