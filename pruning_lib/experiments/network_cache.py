"""Image networks made here, and what they answered, kept under a key of everything they depend on.

Training takes minutes, an attack up to an hour and a row of the report hours.  What was made once is read again: an
interrupted run goes on where it stopped, and a later run measures the very networks an earlier one made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning_lib import _locks
from pruning_lib._files import cache
from pruning_lib.evaluation import quality
from pruning_lib.models import image_networks


@dataclass(frozen=True)
class CachedNetwork:
    """A network, what was measured while it was made, and the key under which ``find`` gives it again."""

    network: nn.Module
    facts: dict[str, Any]
    key: str


def get_or_train(make: Callable[[], tuple[nn.Module, Mapping[str, Any]]], **settings: Any) -> CachedNetwork:
    """What ``make()`` gives, a network and facts about it; made once for the same ``settings``, then read.

    Of two processes that want the same network at the same time the second waits for the first; if that dies, the
    second makes it.

    Parameters
    ----------
    make : only called where nothing is kept yet; interrupted, it leaves nothing behind
    settings : everything the network depends on; numbers, texts, and lists of them

    Raises
    ------
    ValueError
        when what is kept cannot be read, with the folder to delete.
    """
    text = json.dumps(settings, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if not _folder(key).exists():
        with _one_process(key):
            if not _folder(key).exists():  # nobody made it while this process waited
                network, facts = make()
                image_networks.write_new(network, _folder(key), {"facts.json": json.dumps(dict(facts), indent=1),
                                                                 "settings.json": text})
    return find(key)


_ours = threading.local()  # keys of the networks this thread is making


@contextmanager
def _one_process(key: str) -> Iterator[None]:
    """Make the network ``key`` while no other process does; a ``make`` that asks for its own key does not wait."""
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
    """The network that ``get_or_train`` kept under ``key``, or that came with the records, on the CPU, ready to evaluate.

    Raises
    ------
    ValueError
        when there is none, or it cannot be read.
    """
    of_a_key = re.fullmatch(r"[0-9a-f]{16}", key)  # one from a record never leads elsewhere
    places = [place for place in (_folder(key), _with_records(key)) if of_a_key and place.is_dir()]
    if not places:
        raise ValueError(f"no network {key} in {_folder(key).parent}; the run that names it makes it again: "
                         f"pruning-lib run ROW, with the row of the record you took the key from")
    folder = places[0]
    try:
        return CachedNetwork(image_networks.read(folder), json.loads((folder / "facts.json").read_text()), key)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); delete it, it will be made again") from error


def cached_predictions(ask: Callable[[], Sequence[np.ndarray]], **settings: Any) -> list[np.ndarray]:
    """What ``ask()`` gives, images answered right or not, (N,) booleans each; asked once for the same ``settings``.

    Parameters
    ----------
    ask : only called where nothing is kept yet; interrupted, it leaves nothing behind
    settings : everything the answers depend on; numbers, texts, and lists of them

    Raises
    ------
    ValueError
        when what is kept cannot be read, with the file to delete.
    """
    text = json.dumps(settings, sort_keys=True)
    path = cache() / "answered" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        found = {"answers": [quality.pack(right) for right in ask()], "settings": settings}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as work:
            (Path(work) / path.name).write_text(json.dumps(found) + "\n")
            (Path(work) / path.name).replace(path)
    try:
        return [quality.unpack(packed) for packed in json.loads(path.read_text())["answers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, it will be made again") from error


def digest(network: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of all weights: two networks with the same one are the same."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode() + str(tensor.dtype).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _folder(key: str) -> Path:
    return cache() / "made" / key


def _with_records(key: str) -> Path:
    return Path(os.environ.get("PRUNING_RECORDS") or "results").with_name("networks") / key
