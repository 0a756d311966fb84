"""Cache of trained image networks and their predictions, under a key of all settings.

Training takes minutes, an attack up to an hour and a row of the report hours.  Cached results are read again: an
interrupted run continues from them, and a later run measures the same networks as an earlier one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pruning_lib._files import bytes_of, cache, digest
from pruning_lib.evaluation import quality
from pruning_lib.experiments.computed_once import computed_once, json_once, readable
from pruning_lib.models import image_networks


@dataclass(frozen=True)
class CachedNetwork:
    """A network, the measurements of its training, and its key for ``find``."""

    network: nn.Module
    facts: dict[str, Any]
    key: str


def get_or_train(make: Callable[[], tuple[nn.Module, Mapping[str, Any]]], **settings: Any) -> CachedNetwork:
    """Return the network and facts of ``make()``; call it once per ``settings`` and read the cache afterwards.

    Parameters
    ----------
    make : function called if the cache has no entry; an interrupted call leaves no entry
    settings : everything that the network depends on: numbers, texts, and lists of them

    Raises
    ------
    ValueError
        if the entry cannot be read; the message names the folder to delete.
    """
    def write(folder: Path) -> None:
        network, facts = make()
        image_networks.write_new(network, folder, {"facts.json": json.dumps(dict(facts), indent=1),
                                                   "settings.json": json.dumps(settings, sort_keys=True)})

    return computed_once("made", settings, write, _read)


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
    return readable(places[0], _read)


def _read(folder: Path) -> CachedNetwork:
    return CachedNetwork(image_networks.read(folder), json.loads((folder / "facts.json").read_text()), folder.name)


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
    found = json_once("answered", settings, lambda: [quality.pack(right) for right in ask()])
    return [quality.unpack(packed) for packed in found]


def digest_of(network: nn.Module) -> str:
    """Return the first 16 hex digits of the SHA-256 of all weights; equal digests mean equal networks."""
    return digest(part for name, tensor in sorted(network.state_dict().items())
                  for part in (f"{name}{tensor.dtype}".encode(), bytes_of(tensor)))


def _folder(key: str) -> Path:
    return cache() / "made" / key


def _with_records(key: str) -> Path:
    return Path(os.environ.get("PRUNING_RECORDS") or "results").with_name("networks") / key
