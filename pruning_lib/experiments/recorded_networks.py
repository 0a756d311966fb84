"""Networks for analysis: from recorded runs of ``consensus_prune``, published ones, or small ones trained on demand.

Order of this file: record of a network · recorded and published networks · small networks · robust predictions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_lib._extras import extra
from pruning_lib._files import digest
from pruning_lib.data import images
from pruning_lib.evaluation import attacks, quality
from pruning_lib.experiments import code_digests, network_cache, records
from pruning_lib.models import image_networks, loading
from pruning_lib.models.published_networks import NETWORKS, PublishedNetwork
from pruning_lib.pruning import block_ranking, consensus
from pruning_lib.training import sgd

with extra("robustness"):
    import torchattacks

START_LR, TUNE_LR = 0.1, 0.02  # learning rates at the beginning, as in the notebook consensus_prune
SAME_ANSWERS = 0.98  # required share of predictions equal to the record; rounding differs between machines


@dataclass(frozen=True)
class RecordedNetwork:
    """A network and its origin.

    Attributes
    ----------
    criterion : criterion that ranked its blocks; "none" for the dense network, trained as long as the others
    stage : "dense", "round1" ... or "final", as in the record; of a published network the number of blocks removed
    removed_blocks : number of removed blocks
    key : key of the network for ``network_cache.find``
    """

    network: nn.Module
    criterion: str
    stage: str
    removed_blocks: int
    key: str

    @property
    def label(self) -> str:
        return f"{self.criterion} {self.stage}" if self.criterion != "none" else f"dense {self.stage}"


def from_runs(runs: Sequence[str], stages: Sequence[str], image_set: str, *, check_on: int = 500
              ) -> list[RecordedNetwork]:
    """Return the networks of recorded runs, run by run; the first one is the reference for comparisons.

    The predictions of each network on the first test images must agree with its record.  A published network has none.

    Parameters
    ----------
    runs : names of rows of ``consensus_prune``, or published networks, such as "published-resnet56/cka-05"
    stages : networks of each run: "dense", "round1", "round2" ... or "final"; a published network counts once
    check_on : number of test images for the check; 0 for no check

    Raises
    ------
    ValueError
        for a run without a record, on other images, without a cached network or without this stage, for a network
        with other predictions, or for two networks of the same criterion and stage.
    """
    found = []
    for run in runs:
        if run in NETWORKS:
            found.append(of_published(NETWORKS[run]))
            continue
        record = records.read(run)
        shown = record["parameters"].get("image_set")
        if shown != image_set:
            raise ValueError(f"run {run} is on {shown}, not on {image_set}; set image_set")
        rows = {row["stage"] + str(row.get("round", "")): row for row in record["rows"] if "key" in row}
        for stage in stages:
            if stage not in rows:
                known = ", ".join(rows) or "none, run it again"
                raise ValueError(f"run {run} kept no network {stage!r}; it has: {known}")
            row = rows[stage]
            subject = RecordedNetwork(network_cache.find(row["key"]).network, record["parameters"]["criterion"], stage,
                              row["removed_blocks"], row["key"])
            if check_on:
                _check_predictions(subject, record["items"][stage], image_set, check_on, run)
            found.append(subject)
    twice = {subject.label for subject in found if [other.label for other in found].count(subject.label) > 1}
    if twice:
        raise ValueError(f"two networks are called {', '.join(sorted(twice))}; give one run per criterion, and "
                         f"compare seeds in separate rows")
    return found


def of_published(entry: PublishedNetwork) -> RecordedNetwork:
    """Return a network that its authors published; the criterion of the whole one is "none"."""
    criterion = entry.criterion if entry.removed_blocks else "none"
    return RecordedNetwork(loading.load_model(entry.name, device="cpu")[0], criterion, f"{entry.removed_blocks:02}",
                           entry.removed_blocks, entry.name)


def _check_predictions(subject: RecordedNetwork, recorded: str, image_set: str, n: int, run: str) -> None:
    right = quality.unpack(recorded)[:n]
    test = images.load(image_set, "test", len(right))
    now = quality.unpack(quality.accuracy(subject.network, *test)[1])
    same = (now == right).mean()
    if same < SAME_ANSWERS:
        raise ValueError(f"network {subject.key} has the recorded predictions of run {run}, {subject.stage}, on "
                         f"{same:.1%} of {len(right)} test images; it is another network, run {run} again")


def small_networks(names: Sequence[str], image_set: str = "digits", *, rounds: int = 2, epochs: float = 10.0,
                   seed: int = 0) -> list[RecordedNetwork]:
    """Train a small ResNet on ``image_set`` and prune it by each criterion as in ``consensus_prune``, in seconds.

    Parameters
    ----------
    names : keys of ``block_ranking.CRITERIA``, or "none" for the dense network, trained as long
    rounds : number of blocks removed one by one; each removal is followed by a tenth of ``epochs``, the last by twice
        as many
    """
    scored, labels = images.load(image_set, "calibration")
    settings = dict(small=image_set, epochs=epochs, seed=seed, torch=torch.__version__)
    return pruned_by_each(names, images.load(image_set, "train"), (scored[:160], labels[:160]), image_set=image_set,
                          passes=(epochs, epochs / 10, epochs / 10), rounds=rounds, seed=seed, settings=settings,
                          of_the_pruned={"rounds": rounds})


def pruned_by_each(names: Sequence[str], train: tuple[Tensor, Tensor], scored: tuple[Tensor, Tensor], *,
                   image_set: str, passes: tuple[float, float, float], rounds: int, seed: int,
                   settings: dict[str, Any], of_the_pruned: dict[str, Any], min_blocks: int = 2,
                   **tuning: Any) -> list[RecordedNetwork]:
    """Train one ResNet-20 and prune it by each criterion; every network is made once and cached.

    Parameters
    ----------
    names : keys of ``block_ranking.CRITERIA``, or "none" for the dense network, trained as long as the others
    train, scored : images (N, C, H, W) and classes (N,) to learn from, and to rank blocks on
    image_set : its channels and pixel statistics
    passes : epochs before the first cut, after each cut, and after the last one besides
    settings, of_the_pruned : keys of the cache, of all networks and further ones of the pruned
    min_blocks : smallest number of blocks in every stage
    tuning : further arguments of ``sgd.train``
    """
    def tuned(network: nn.Module, epochs: float, lr: float, number: int) -> tuple[nn.Module, dict[str, Any]]:
        return sgd.train(network, *train, epochs=epochs, lr=lr, seed=1000 * seed + number,
                         **{"dtype": "float32", **tuning}), {}

    def pruned(name: str) -> tuple[nn.Module, dict[str, Any]]:
        network = network_cache.find(start.key).network
        for number in range(1, rounds + 1):
            if name != "none":
                network = consensus.step(network, lambda now: block_ranking.CRITERIA[name].order(
                    now, sgd.pixels(scored[0]), scored[1], seed), min_blocks=min_blocks).model
            tuned(network, passes[1], TUNE_LR, number)
        return tuned(network, passes[2], TUNE_LR, rounds + 1)

    entry = images.IMAGES[image_set]
    config = image_networks.ImageConfig("cifar_resnet", {"depth": 20, "channels": len(entry.mean)},
                                        entry.mean, entry.std)
    start = network_cache.get_or_train(lambda: tuned(image_networks.build(config, seed=seed), passes[0], START_LR, 0),
                                       **settings)
    made = {name: network_cache.get_or_train(partial(pruned, name), **settings, criterion=name, **of_the_pruned)
            for name in names}
    return [RecordedNetwork(m.network, name, "final", rounds * (name != "none"), m.key) for name, m in made.items()]


def robust_correct(subject: RecordedNetwork, attack: str, pixels: Tensor, labels: Tensor, *, epsilons: Sequence[float],
            **settings: Any) -> list[np.ndarray]:
    """Return ``attacks.robust_correct`` of a network, cached per budget, so an interrupted run can continue.

    Parameters
    ----------
    attack : key of ``attacks.ATTACKS``
    settings : seed, steps and restarts of ``attacks.robust_correct``
    """
    minimal_norm = attacks.ATTACKS.facts[attack]["minimal_norm"]  # one attack serves all budgets
    about = {"attack": attack, "network": subject.key, "weights": network_cache.digest_of(subject.network),
             "images": digest(pixels.numpy().tobytes() + labels.numpy().tobytes()),
             "code": _code(attack), "torch": torch.__version__,
             "torchattacks": torchattacks.__version__, "device": next(subject.network.parameters()).device.type}
    found: list[np.ndarray] = []
    for budgets in [list(epsilons)] if minimal_norm else [[epsilon] for epsilon in epsilons]:
        ask = partial(attacks.robust_correct, attack, subject.network, pixels, labels, epsilons=budgets, **settings)
        found += network_cache.cached_predictions(ask, epsilons=budgets, **settings, **about)
    return found


def _code(attack: str) -> dict[str, str]:
    """Return digests of the code of one attack; code of the other attacks does not count."""
    found = code_digests.digests(
        [f"from pruning_lib.evaluation import attacks\nattacks.robust_correct, attacks.{attack}"])
    others = {other for other in attacks.ATTACKS if other != attack}
    return {name: digest for name, digest in found.items() if not others & set(re.findall(r"\w+", name))}
