"""Tables of named entries: names are looked up, never parsed.  An entry is a decorated function or a record."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class Table(dict):
    """A dict whose unknown keys raise an error that lists the known ones.

    Parameters
    ----------
    what : noun for one entry in messages, e.g. ``"family"``

    Attributes
    ----------
    facts : dict, name -> keyword arguments given at registration; tests may rely on them
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.facts: dict[str, dict[str, Any]] = {}

    def __missing__(self, key: object) -> Any:
        known = ", ".join(sorted(map(str, self)))
        more = f" (nearest: {nearest(str(key), self)})" if len(self) > 6 else ""
        raise ValueError(f"unknown {self.what} {key!r}; known: {known}{more}")

    def register(self, name: str | None = None, **facts: Any) -> Callable:
        """Return a decorator that enters a function under its own name (or ``name``)."""

        def enter(entry: Callable) -> Callable:
            key = name or entry.__name__
            if key in self:
                raise ValueError(f"{self.what} {key!r} is registered twice")
            self[key] = entry
            self.facts[key] = facts
            return entry

        return enter


def nearest(name: str, known: Iterable[object], n: int = 3) -> str:
    """Return the ``n`` known names most like ``name``, the nearest first, joined by commas."""
    names = [str(other) for other in known]
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), list(lower), n=n, cutoff=0)
    return ", ".join(lower[other] for other in close)


def function_of(place: str) -> Callable:
    """Return the function that ``"module:function"`` names; modules of the current folder count.

    Raises
    ------
    ValueError
        when there is no such module or function, or the module cannot be imported.
    """
    module, _, name = place.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module of the user's own raises
        raise ValueError(f"{place!r} cannot be loaded: {type(error).__name__}: {error}; wanted MODULE:FUNCTION, with "
                         f"the module in the current folder or installed") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"{place!r} is a {type(found).__name__}, not a function")
    return found
