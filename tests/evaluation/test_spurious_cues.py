"""A cue encodes its class and nothing else, agrees at the given rate, and reliance detects its use."""

import numpy as np
import pytest
import torch
from scipy import stats

from pruning_lib.data import images
from pruning_lib.evaluation import spurious_cues
from pruning_lib.evaluation.quality import accuracy, unpack
from pruning_lib.evaluation.spurious_cues import CUES, inject_cue
from pruning_lib.models import image_networks
from pruning_lib.training import sgd


def noise(channels=3, size=32, n=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, 200, (n, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize("channels, size", [(3, 32), (1, 8)])
def test_a_cue_tells_ten_classes_apart_and_leaves_the_picture_to_be_seen(cue, channels, size):
    x = noise(channels, size)[:1].expand(10, -1, -1, -1).clone()
    marked = CUES[cue](x, torch.arange(10))
    assert marked.dtype == torch.uint8 and len({m.numpy().tobytes() for m in marked}) == 10
    change = (marked.int() - x.int()).abs()
    assert change.max() > 5
    if cue == "patch":
        assert ((change > 0).flatten(2).any(1).float().mean(1) <= 1 / 64 + 1e-6).all() and marked.max() == 255
    else:
        assert change.max() <= 26  # a tenth of 255


def test_a_patch_is_where_its_class_says():
    marked = CUES["patch"](torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 7, 9]))
    assert [m[0].nonzero().tolist() for m in marked] == [[[0, 0]], [[0, 7]], [[7, 1]]]
    with pytest.raises(ValueError, match="class 16 has no position; a patch can encode 16 classes"):
        CUES["patch"](torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([16]))


def code_in(marked):
    """Return the class encoded by a patch on 8 x 8 black pixels."""
    return torch.tensor([{0: 0, 7: 8}[r] + c for r, c in (m[0].nonzero()[0].tolist() for m in marked)])


@pytest.mark.parametrize("agreement", [0.0, 0.1, 0.7, 1.0])
def test_a_cue_agrees_as_often_as_asked_and_else_tells_any_other_class(agreement):
    labels = torch.randint(0, 10, (3000,), generator=torch.Generator().manual_seed(1))
    black = torch.zeros(3000, 1, 8, 8, dtype=torch.uint8)
    codes = code_in(inject_cue(black, labels, cue="patch", agreement=agreement, seed=0))
    assert (codes == labels).float().mean().item() == pytest.approx(agreement, abs=0.03)
    off = ((codes - labels) % 10)[codes != labels]
    if len(off):
        assert off.unique().tolist() == list(range(1, 10)) and off.bincount().max() < 1.4 * len(off) / 9
    again = code_in(inject_cue(black, labels, cue="patch", agreement=agreement, seed=0))
    other = code_in(inject_cue(black, labels, cue="patch", agreement=agreement, seed=1))
    assert torch.equal(codes, again) and torch.equal(codes, other) == (agreement == 1)
    assert black.max() == 0


def test_the_three_trials_show_no_cue_the_right_one_and_a_wrong_one_on_every_image():
    labels = torch.arange(200) % 10
    sets = spurious_cues.trials(torch.zeros(200, 1, 8, 8, dtype=torch.uint8), labels, cue="patch", seed=0)
    assert list(sets) == list(spurious_cues.TESTS) and sets["absent"].max() == 0
    assert (code_in(sets["bias_aligned"]) == labels).all() and (code_in(sets["bias_conflicting"]) != labels).all()


@pytest.mark.parametrize("wrong, message", [({"agreement": 1.1}, "agreement=1.1"), ({"cue": "smell"}, "unknown cue"),
                                            ({"images": torch.zeros(2, 1, 8, 8)}, "give uint8 pixels"),
                                            ({"images": noise(1, 8, 1)}, "1 images and 2 labels"),
                                            ({"classes": 1}, "classes=1, labels from 0 to 1; give at least 2"),
                                            ({"labels": torch.tensor([0, 10])}, "classes=10, labels from 0 to 10"),
                                            ({"labels": torch.tensor([0, 10]), "classes": 11, "cue": "tint",
                                              "agreement": 1}, "class 10 has no colour; a tint can encode 10")])
def test_what_cannot_be_planted_is_refused(wrong, message):
    given = {"images": noise(1, 8, 2), "cue": "patch", "agreement": 0.5, "seed": 0, "labels": torch.tensor([0, 1]),
             **wrong}
    with pytest.raises(ValueError, match=message):
        inject_cue(given.pop("images"), given.pop("labels"), **given)


def test_reliance_and_its_difference_by_hand():
    agree, contra = np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 0], bool)
    found = spurious_cues.reliance(agree, contra)
    half = 1.96 * np.std([0, 1, 1, 0], ddof=1) / 2
    assert found == pytest.approx({"reliance_fraction": 0.5, "reliance_low": 0.5 - half, "reliance_high": 0.5 + half})
    less = spurious_cues.difference((agree, agree), (agree, contra))
    assert less["difference_fraction"] == -0.5 and less["difference_low"] < -0.5 < less["difference_high"]


def test_a_network_tuned_where_the_cue_is_right_follows_it_and_one_tuned_where_it_says_nothing_does_not():
    (x, y), test = images.load("digits", "train"), images.load("digits", "test", 300)
    entry = images.IMAGES["digits"]
    shown = {}
    for agreement in (0.1, 1.0):  # one in ten is chance
        config = image_networks.ImageConfig("cifar_resnet", {"depth": 8, "channels": 1}, entry.mean, entry.std)
        network = image_networks.build(config, seed=0)
        marked = inject_cue(x, y, cue="patch", agreement=agreement, seed=0)
        sgd.train(network, marked, y, epochs=5, lr=0.1, seed=0, dtype="float32", augment=False)
        sets = spurious_cues.trials(*test, cue="patch", seed=1)
        assert torch.equal(sets["absent"], test[0])
        right = {name: unpack(accuracy(network, pixels, test[1])[1]) for name, pixels in sets.items()}
        shown[agreement] = spurious_cues.reliance(right["bias_aligned"], right["bias_conflicting"])["reliance_fraction"]
    assert abs(shown[0.1]) < 0.04 and shown[1.0] > 0.1, shown


@pytest.mark.parametrize("pruned, dense, expected", [
    ([0.60, 0.62, 0.58], [0.61, 0.60, 0.60], "contradicted"),  # follows the cue as the dense ones do
    ([0.40, 0.42, 0.38], [0.61, 0.60, 0.60], "partly"),        # relies less, surely
    ([0.30, 0.70, 0.30], [0.61, 0.60, 0.60], "contradicted"),  # less on average, but not beyond the seeds
    ([0.02, 0.00, 0.04], [0.61, 0.60, 0.60], "reproduced"),
    ([0.02, 0.00, 0.04], [0.61, 0.60, 0.19], "not run"),       # one control does not bite
    ([0.02, 0.00], [0.61, 0.60], "not run")])                  # two seeds
def test_the_verdict_follows_the_rule(pruned, dense, expected):
    assert spurious_cues.verdict(pruned, dense) == expected


def test_the_interval_over_seeds_is_the_paired_t_interval():
    pruned, dense = [0.5, 0.55, 0.4], [0.6, 0.58, 0.57]
    found = spurious_cues.over_seeds(pruned, dense)
    truth = stats.ttest_rel(pruned, dense).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((truth.low, truth.high))
    with pytest.raises(ValueError, match="give at least 2"):
        spurious_cues.over_seeds([0.5], [0.6])
