"""Cache of trained image networks and their predictions, under a key of all settings.

Training takes minutes, an attack up to an hour and a row of the report hours.  Cached results are read again: an
interrupted run continues from them, and a later run measures the same networks as an earlier one.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pruning_lib import _locks
from pruning_lib._files import bytes_of, cache, digest, replacing
from pruning_lib.evaluation import quality
from pruning_lib.models import image_networks


@dataclass(frozen=True)
class CachedNetwork:
    """A network, the measurements of its training, and its key for ``find``."""

    network: nn.Module
    facts: dict[str, Any]
    key: str


def get_or_train(make: Callable[[], tuple[nn.Module, Mapping[str, Any]]], **settings: Any) -> CachedNetwork:
    """Return the network and facts of ``make()``; call it once per ``settings`` and read the cache afterwards.

    If two processes request the same network, the second waits for the first; if the first dies, the second trains the
    network.

    Parameters
    ----------
    make : function called if the cache has no entry; an interrupted call leaves no entry
    settings : everything that the network depends on: numbers, texts, and lists of them

    Raises
    ------
    ValueError
        if the entry cannot be read; the message names the folder to delete.
    """
    text = json.dumps(settings, sort_keys=True)
    key = digest(text)
    if not _folder(key).exists():
        with _one_process(key):
            if not _folder(key).exists():  # still missing after the wait
                network, facts = make()
                image_networks.write_new(network, _folder(key), {"facts.json": json.dumps(dict(facts), indent=1),
                                                                 "settings.json": text})
    return find(key)


_ours = threading.local()  # keys of the networks in training in this thread


@contextmanager
def _one_process(key: str) -> Iterator[None]:
    """Hold the lock of the network ``key``; a nested request for the same key does not wait."""
    keys = vars(_ours).setdefault("keys", set())
    if key in keys:
        yield
        return
    with _locks.lock(_folder(key).with_name(f".{key}.lock"),
                    log=lambda who: print(f"waiting for a network that {who} is making", file=sys.stderr)):
        keys.add(key)
        try:
            yield
        finally:
            keys.discard(key)


def find(key: str) -> CachedNetwork:
    """Return the cached network ``key``, or the one shipped with the records, on the CPU in evaluation mode.

    Raises
    ------
    ValueError
        if there is none, or it cannot be read.
    """
    of_a_key = re.fullmatch(r"[0-9a-f]{16}", key)  # a key from a record is never a path
    places = [place for place in (_folder(key), _with_records(key)) if of_a_key and place.is_dir()]
    if not places:
        raise ValueError(f"no network {key} in {_folder(key).parent}; its run trains it again: "
                         f"pruning-lib run ROW, with the row of the record that has the key")
    folder = places[0]
    try:
        return CachedNetwork(image_networks.read(folder), json.loads((folder / "facts.json").read_text()), key)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); delete it, it will be made again") from error


def cached_predictions(ask: Callable[[], Sequence[np.ndarray]], **settings: Any) -> list[np.ndarray]:
    """Return the correctness masks (N,) of ``ask()``; call it once per ``settings`` and read the cache afterwards.

    Parameters
    ----------
    ask : function called if the cache has no entry; an interrupted call leaves no entry
    settings : everything that the masks depend on: numbers, texts, and lists of them

    Raises
    ------
    ValueError
        if the entry cannot be read; the message names the file to delete.
    """
    text = json.dumps(settings, sort_keys=True)
    path = cache() / "answered" / f"{digest(text)}.json"
    if not path.exists():
        found = {"answers": [quality.pack(right) for right in ask()], "settings": settings}
        with replacing(path) as beside:
            beside.write_text(json.dumps(found) + "\n")
    try:
        return [quality.unpack(packed) for packed in json.loads(path.read_text())["answers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, it will be made again") from error


def digest_of(network: nn.Module) -> str:
    """Return the first 16 hex digits of the SHA-256 of all weights; equal digests mean equal networks."""
    return digest(part for name, tensor in sorted(network.state_dict().items())
                  for part in (f"{name}{tensor.dtype}".encode(), bytes_of(tensor)))


def _folder(key: str) -> Path:
    return cache() / "made" / key


def _with_records(key: str) -> Path:
    return Path(os.environ.get("PRUNING_RECORDS") or "results").with_name("networks") / key
