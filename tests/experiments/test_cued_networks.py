"""Networks that saw a cue from the first step rely on it; without information in the cue they do not."""

import pytest

from pruning_lib.data import images
from pruning_lib.evaluation import quality, spurious_cues
from pruning_lib.experiments.cued_networks import Schedule, train_and_prune


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))


def reliance(network, cue):
    test, wanted = images.load("digits", "test")
    right = {name: quality.accuracy(network, shown, wanted)[1]
             for name, shown in spurious_cues.trials(test, wanted, cue=cue, seed=7).items()}
    return spurious_cues.reliance(*(quality.unpack(right[name]) for name in ("bias_aligned", "bias_conflicting")))


def test_a_cue_is_learned_where_it_tells_the_class_and_only_there():
    found = {}
    for agreement in (1.0, 0.1):
        schedule = Schedule("digits", "tint", agreement, None, 4.0, 1, 0.5, 0.5, per_class=4)
        dense, pruned = train_and_prune(["none", "front_to_back"], schedule, seed=0)
        assert (dense.removed_blocks, pruned.removed_blocks) == (0, 1)
        found[agreement] = [reliance(subject.network, "tint")["reliance_fraction"] for subject in (dense, pruned)]
    assert min(found[1.0]) > 0.5 and max(map(abs, found[0.1])) < 0.2
