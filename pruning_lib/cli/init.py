"""The command ``init``: lay out the notebooks and the book in a folder, for ``run``, ``status`` and ``book``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from pruning_lib import _files

PARTS = ("notebooks", "book", "data/inputs", "data/results", "CONTRIBUTING.md")


def register(commands: Any) -> None:
    """Add ``init`` to the parser of ``pruning-lib``."""
    about = "lay out the notebooks, the published records and the book in a new folder"
    parser = commands.add_parser("init", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("folder", type=Path, help="must not exist yet, or be empty")
    parser.set_defaults(act=init)


def init(arguments: argparse.Namespace) -> int:
    """Copy the parts; SystemExit, before anything is written, when the folder holds something."""
    folder, source = arguments.folder, _files.tree()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} exists and is not empty; give another folder")
    for name in PARTS:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target, ignore=shutil.ignore_patterns("_build", "__pycache__"))
        else:
            shutil.copyfile(source / name, target)
    print(f"{folder}: now cd there, then: pruning-lib run amp_prune --out mine")
    return 0
