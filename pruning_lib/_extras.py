"""Packages that only some of the work needs: an extra of ``pip install`` brings them, and an error names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class MissingExtra(ImportError):
    """A package is not installed; the message names the extra that brings it."""


@contextmanager
def extra(name: str, otherwise: str = "") -> Iterator[None]:
    """Name the extra ``name``, and the work possible without it, when a package imported inside is not installed.

    Raises
    ------
    MissingExtra
        with the command that installs the package.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pruning_lib"):
            raise
        raise MissingExtra(f"{error.name} is not installed and this needs it; "
                           f'install it with: pip install "pruning-lib[{name}]"' + otherwise) from error


class Lazy:
    """A module that is imported when something in it is first used; for modules whose other parts do without it."""

    def __init__(self, module: str, extra_name: str) -> None:
        self._module, self._extra = module, extra_name

    def __getattr__(self, name: str) -> Any:
        with extra(self._extra):
            module = import_module(self._module)
        return getattr(module, name)
