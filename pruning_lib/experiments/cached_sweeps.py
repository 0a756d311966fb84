"""Published networks by name, and cached predictions of any network under a sweep of attacks.

Order of this file: published networks · predictions without attack · under attack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning_lib._extras import extra
from pruning_lib._files import digest
from pruning_lib.evaluation import attack_sweeps, attacks
from pruning_lib.experiments import code_digests, network_cache
from pruning_lib.experiments.recorded_networks import RecordedNetwork, of_published
from pruning_lib.models import published_networks

with extra("robustness"):
    import torchattacks


def published(names: Sequence[str]) -> list[RecordedNetwork]:
    """Return published networks by name, the one that the others are compared with first.

    Parameters
    ----------
    names : names of files as in ``published_networks``, such as "consensus-10"

    Raises
    ------
    ValueError
        for a name that is none of them.
    ConnectionError
        for a network without its files, with the address of the authors' files.
    """
    known = {entry.file: entry for entry in published_networks.NETWORKS.values()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no published network is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [of_published(known[name]) for name in names]


def clean_correct(network: RecordedNetwork, pixels: Tensor, labels: Tensor) -> np.ndarray:
    """Return which images a network answers rightly as they are, (N,) booleans; kept in the cache."""
    model = attack_sweeps.fused(network.network)

    def ask() -> list[np.ndarray]:
        return [attacks.correct_mask(model, pixels, labels).numpy()]

    return _cached(ask, network, pixels, labels, "correct_mask", "clean")[0]


def fgsm_correct(network: RecordedNetwork, pixels: Tensor, labels: Tensor, *, epsilons: Sequence[float]
                 ) -> list[np.ndarray]:
    """Return ``attack_sweeps.fgsm`` of a network, kept in the cache."""
    ask = partial(attack_sweeps.fgsm, attack_sweeps.fused(network.network), pixels, labels, epsilons)
    return _cached(ask, network, pixels, labels, "fgsm", "sweep", epsilons=list(epsilons))


def survivors(network: RecordedNetwork, attack: str, pixels: Tensor, labels: Tensor, *, epsilons: Sequence[float],
              left: Sequence[np.ndarray] | None = None, seed: int = 0, steps: int | None = None) -> list[np.ndarray]:
    """Return ``attack_sweeps.survivors`` of a network, kept in the cache."""
    settings: dict[str, Any] = {"epsilons": list(epsilons), "seed": seed, "steps": steps}
    ask = partial(attack_sweeps.survivors, attack, attack_sweeps.fused(network.network), pixels, labels, left=left,
                  **settings)
    before = None if left is None else digest(np.stack(left).tobytes())
    return _cached(ask, network, pixels, labels, attack, "survivors", left=before, **settings)


def _cached(ask: Callable[[], Sequence[np.ndarray]], network: RecordedNetwork, pixels: Tensor, labels: Tensor,
            attack: str, kind: str, **settings: Any) -> list[np.ndarray]:
    """Return the predictions of ``ask``, called once for the same network, images, settings, code and versions."""
    return network_cache.cached_predictions(
        ask, attack=attack, kind=kind, network=network.key, weights=network_cache.digest_of(network.network),
        images=digest(pixels.numpy().tobytes() + labels.numpy().tobytes()), code=_code(attack),
        torch=torch.__version__, torchattacks=torchattacks.__version__, **settings)


def _code(attack: str) -> dict[str, str]:
    """Return digests of the code that an attack leads to, without that of the other attacks."""
    used = f"attack_sweeps.fgsm, attack_sweeps.survivors, attack_sweeps.fused, attacks.{attack}"
    found = code_digests.digests([f"from pruning_lib.evaluation import attack_sweeps, attacks\n{used}"])
    others = {other for other in attacks.ATTACKS if other != attack}
    return {name: value for name, value in found.items() if not others & set(re.findall(r"\w+", name))}
