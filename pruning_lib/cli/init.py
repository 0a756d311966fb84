"""The command ``init``: lay out the notebooks and the book in a folder, for ``run``, ``status`` and ``book``."""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from typing import Any

from pruning_lib import _files
from pruning_lib.cli import output

PARTS = ("notebooks", "book", "data/inputs", "data/results", "CONTRIBUTING.md")


def init(arguments: argparse.Namespace) -> int:
    """Copy the parts; return the exit status, 1 when the folder holds something."""
    return output.answer(_init, arguments)


def _init(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Copy the parts; ValueError, before anything is written, when the folder holds something."""
    folder, source = arguments.folder, _files.tree()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give another folder")
    for name in PARTS:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target, ignore=shutil.ignore_patterns("_build", "__pycache__"))
        else:
            shutil.copyfile(source / name, target)
    steps = [] if find_spec("papermill") else ['pip install "pruning-lib[report]"']
    steps += [f"cd {folder}", "pruning-lib run amp_prune --out mine"]
    return {"folder": str(folder), "next": steps}, f"{folder}: now " + ", then: ".join(steps)
