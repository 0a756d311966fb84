"""Networks of recorded runs equal the recorded ones; small networks follow the procedure of the runs."""

import pytest
from test_keras_resnet import keras_network
from test_published_networks import put

from pruning_lib.data import images
from pruning_lib.evaluation import attacks, quality
from pruning_lib.experiments import network_cache, recorded_networks, records
from pruning_lib.models import families
from pruning_lib.training import sgd


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pair(cache):
    return recorded_networks.small_networks(["none", "cka"], epochs=2.0, rounds=1)


@pytest.fixture
def recorded(pair, tmp_path, monkeypatch):
    """Write the records of both networks and return a function that writes a changed record."""
    monkeypatch.setenv("PRUNING_RESULTS", str(tmp_path))
    monkeypatch.delenv("PRUNING_RECORDS", raising=False)
    test = images.load("digits", "test")

    def write(subject, **changed):
        monkeypatch.setenv("PRUNING_RUN", subject.criterion)
        row = {"stage": "final", "removed_blocks": subject.removed_blocks, "key": subject.key}
        given = {"image_set": "digits", "criterion": subject.criterion}
        records.write("consensus_prune", parameters={**given, **changed.get("parameters", {})}, values={"a": 1},
                      rows=[{**row, **changed.get("row", {})}],
                      items={"final": quality.accuracy(subject.network, *test)[1]})

    for subject in pair:
        write(subject)
    return write


def test_small_ones_lose_blocks_and_the_dense_one_is_tuned_as_long(pair):
    dense, pruned = pair
    assert [s.removed_blocks for s in pair] == [0, 1] and [s.label for s in pair] == ["dense final", "cka final"]
    assert [len(families.residual_blocks(s.network)) for s in pair] == [9, 8]
    accuracies = [quality.accuracy(s.network, *images.load("digits", "test"))[0]["accuracy_fraction"] for s in pair]
    assert min(accuracies) > 0.3
    again = recorded_networks.small_networks(["none", "cka"], epochs=2.0, rounds=1)
    assert [network_cache.digest_of(s.network) for s in again] == [network_cache.digest_of(s.network) for s in pair]


def test_recorded_networks_are_found_again_in_the_order_asked_for(pair, recorded):
    found = recorded_networks.from_runs(["cka", "none"], ["final"], "digits")
    assert [s.criterion for s in found] == ["cka", "none"] and [s.removed_blocks for s in found] == [1, 0]
    assert ([network_cache.digest_of(s.network) for s in found]
            == [network_cache.digest_of(s.network) for s in reversed(pair)])


def test_a_network_that_answers_otherwise_than_recorded_is_refused(pair, recorded):
    dense, pruned = pair
    recorded(pruned, row={"key": dense.key})
    refusal = f"network {dense.key} has the recorded predictions .* of 500 .* another network"
    with pytest.raises(ValueError, match=refusal):
        recorded_networks.from_runs(["cka"], ["final"], "digits")


def test_two_networks_of_one_name_are_refused(pair, recorded):
    with pytest.raises(ValueError, match="two networks are called cka final"):
        recorded_networks.from_runs(["cka", "none", "cka"], ["final"], "digits", check_on=0)


def test_answers_under_attack_are_those_of_the_attack_and_asked_for_once(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    test, labels = images.load("digits", "test", 40)
    x, asked, plain = sgd.pixels(test), [], attacks.robust_correct

    def noting(name, network, *given, epsilons, **more):
        asked.append((name, epsilons))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return plain(name, network, *given, epsilons=epsilons, **more)

    monkeypatch.setattr(attacks, "robust_correct", noting)
    dense, pruned = pair
    first = recorded_networks.robust_correct(dense, "pgd", x, labels, epsilons=[0.05, 0.1], steps=2)
    wanted = plain("pgd", dense.network, x, labels, epsilons=[0.05, 0.1], steps=2)
    assert all((a == b).all() for a, b in zip(first, wanted, strict=True)) and 0 < first[1].sum() < first[0].sum()
    with pytest.raises(KeyboardInterrupt):  # the second budget of this one
        recorded_networks.robust_correct(pruned, "pgd", x, labels, epsilons=[0.05, 0.1], steps=2)
    again = recorded_networks.robust_correct(dense, "pgd", x, labels, epsilons=[0.05, 0.1], steps=2)
    assert len(asked) == 4 and all((a == b).all() for a, b in zip(first, again, strict=True))
    recorded_networks.robust_correct(pruned, "pgd", x, labels, epsilons=[0.05, 0.1], steps=2)
    assert asked[4:] == [("pgd", [0.1])]
    for other in (dict(steps=3), dict(seed=1), dict(epsilons=[0.06]), dict(pixels=x.flip(0)), dict(attack="fgsm")):
        given = {"attack": "pgd", "pixels": x, "epsilons": [0.05], "steps": 2, **other}
        recorded_networks.robust_correct(dense, given.pop("attack"), given.pop("pixels"), labels,
                         **{**given, **({"steps": 1} if "attack" in other else {})})
    assert len(asked) == 10
    recorded_networks.robust_correct(dense, "cw", x, labels, epsilons=[0.5, 1.0])
    assert asked[10:] == [("cw", [0.5, 1.0])]  # one attack for both budgets


def test_what_is_not_recorded_is_refused_with_the_way_out(pair, recorded):
    with pytest.raises(ValueError, match="kept no network 'round3'; it has: final"):
        recorded_networks.from_runs(["cka"], ["round3"], "digits")
    with pytest.raises(ValueError, match="run cka is on digits, not on cifar10; set image_set"):
        recorded_networks.from_runs(["cka"], ["final"], "cifar10")
    with pytest.raises(ValueError, match="no record of run 'random'"):
        recorded_networks.from_runs(["random"], ["final"], "digits")
    recorded(pair[0], row={"key": "0" * 16})
    with pytest.raises(ValueError, match="no network 0{16}"):
        recorded_networks.from_runs(["none"], ["final"], "digits")


def test_published_networks_stand_beside_recorded_ones(pair, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_MODELS", str(tmp_path))
    (tmp_path / "published-resnet56").mkdir()
    whole, cut = keras_network(blocks=(9, 9, 9)), keras_network(blocks=(9, 9, 8))
    for name, network in (("consensus-00", whole), ("cka-01", cut)):
        put(tmp_path / "published-resnet56", name, network)
    names = ["published-resnet56/consensus-00", "published-resnet56/cka-01", "none"]
    found = recorded_networks.from_runs(names, ["final"], "digits")
    assert [(s.label, s.removed_blocks) for s in found] == [("dense 00", 0), ("cka 01", 1), ("dense final", 0)]
    assert [len(families.residual_blocks(s.network)) for s in found] == [27, 26, 9]
