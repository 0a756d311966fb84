"""Cache of results that take minutes or hours: computed once for the same settings, then read.

A result is a file or a folder of the cache, under a key of everything that it depends on.  An interrupted run continues
from the results it has, and a later run uses the same ones.
Order of this file: any result · numbers and texts · locks.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from pruning_lib import _locks
from pruning_lib._files import cache, digest, replacing

Result = TypeVar("Result")


def computed_once(kind: str, settings: Mapping[str, Any], make: Callable[[Path], Any],
                  read: Callable[[Path], Result], *, ending: str = "") -> Result:
    """Return the result of ``read`` for these settings; ``make`` is called once, and later calls only read.

    If two processes request the same result, the second waits for the first; if the first dies, the second computes it.

    Parameters
    ----------
    kind : folder under the cache
    settings : everything that the result depends on: numbers, texts, and lists of them
    make : function that writes the result to a path, whole or not at all
    read : function that reads it from there
    ending : end of the file name, as in ``".json"``; empty for a folder

    Raises
    ------
    ValueError
        if the result cannot be read; the message names the file or folder to delete.
    """
    path = place(kind, settings, ending)
    if not path.exists():
        with _one_process(path):
            if not path.exists():  # still missing after the wait
                make(path)
    return readable(path, read)


def json_once(kind: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Return ``make()``, numbers and texts that JSON can hold; called once for these settings, as ``computed_once``."""
    def write(path: Path) -> None:
        found = json.dumps({"settings": dict(settings), "found": make()}, indent=1)
        with replacing(path) as beside:
            beside.write_text(found + "\n")

    def read(path: Path) -> Any:
        content = json.loads(path.read_text())
        return content["found"] if "found" in content else content["answers"]  # files of version 0.1

    return computed_once(kind, settings, write, read, ending=".json")


def place(kind: str, settings: Mapping[str, Any], ending: str = "") -> Path:
    """Return the path of the result for these settings; the order of the settings does not matter."""
    return cache() / kind / f"{digest(json.dumps(dict(settings), sort_keys=True))}{ending}"


def readable(path: Path, read: Callable[[Path], Result]) -> Result:
    """Return ``read(path)``; ValueError that names the path to delete where it cannot be read."""
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, it will be made again") from error


_ours = threading.local()  # paths of the results in the making in this thread


@contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Hold the lock of a result; a nested request for the same one does not wait."""
    paths = vars(_ours).setdefault("paths", set())
    if path in paths:
        yield
        return
    with _locks.lock(path.with_name(f".{path.name}.lock"),
                    log=lambda who: print(f"waiting for a result that {who} is computing", file=sys.stderr)):
        paths.add(path)
        try:
            yield
        finally:
            paths.discard(path)
