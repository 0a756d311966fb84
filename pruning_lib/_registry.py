"""Tables of named entries: names are looked up, never parsed.  An entry is a decorated function or a record."""

from __future__ import annotations

from collections.abc import Callable
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
        raise ValueError(f"unknown {self.what} {key!r}; known: {known}")

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
