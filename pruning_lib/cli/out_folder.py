"""The folder that ``prune`` writes to: refused before work starts if the checkpoint could not be put there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from pruning_lib.models import checkpoints
from pruning_lib.models.parameter_counts import parameter_bytes


def refuse_folder(out: Path, arguments: dict[str, Any]) -> None:
    """Raise an error unless ``out`` is new, or an empty folder that can be replaced.

    The checkpoint is written to a folder beside ``out``, compared, and renamed, so ``out`` can be neither a link, nor a
    mount point, nor the current folder.

    Parameters
    ----------
    arguments : of the command, to recognise the result of an earlier run of it

    Raises
    ------
    FileExistsError, ValueError, PermissionError
        with the way out.
    """
    if out.is_symlink():
        raise ValueError(f"--out {out} is a link; give the folder itself, or a new one")
    if out.exists():
        _refuse_existing(out, arguments)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"--out {out}: {parent} is a file; give another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: no permission to write in {parent}; give another folder")


def _refuse_existing(out: Path, arguments: dict[str, Any]) -> None:
    if not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; give a new folder")
    _refuse_in_use(out, arguments)
    if (out / "pruning.json").is_file():
        raise FileExistsError(_earlier(out, arguments))
    if any(out.iterdir()):
        raise FileExistsError(f"--out {out} exists and is not empty; give another folder or remove it first")


def _refuse_in_use(out: Path, arguments: dict[str, Any]) -> None:
    """Raise ValueError for a folder that nobody should remove to make room."""
    place, here = out.resolve(), Path.cwd().resolve()
    if place == Path(arguments.get("model", "")).expanduser().resolve() != here:
        raise ValueError(f"--out {out} is the folder of the model itself; give a new folder")
    uses = {"the current folder": place == here, "around the current folder": place in here.parents,
            "a mount point": place.is_mount()}
    for use, applies in uses.items():
        if applies:
            raise ValueError(f"--out {out} is {use}; give a new folder in it, such as --out {out / 'pruned'}")


def _earlier(out: Path, arguments: dict[str, Any]) -> str:
    """Return how an earlier run that made ``out`` differs, and the way out."""
    try:
        before = json.loads((out / "pruning.json").read_text()).get("arguments", {})
    except (ValueError, OSError, AttributeError):
        before = {}
    wanted = json.loads(json.dumps(arguments, default=str))
    other = [f"--{key.replace('_', '-')} {before.get(key)}" for key in wanted if before.get(key) != wanted[key]]
    made = ("has the result of this very command" if not other
            else f"has a model made with other options ({', '.join(other[:3])})")
    return (f"--out {out} {made}; measure it again with: pruning-lib evaluate {out}; or give another folder, or remove "
            f"it first")


def refuse_full_disk(out: Path, model: nn.Module, kept_fraction: float) -> None:
    """Raise OSError unless the disk of ``out`` has room for the kept part of the model."""
    needed = kept_fraction * parameter_bytes(model)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"--out {out}: the checkpoint takes about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
                      f"give a folder on another disk")


def replace_checkpoint(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Save ``model`` in place of the checkpoint in ``out``; the old one stays until the new one is complete."""
    new, old = (out.with_name(f".{out.name}.{state}") for state in ("tuned", "untuned"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)  # of an interrupted run
    checkpoints.save(model, tokenizer, new)
    out.rename(old)
    new.rename(out)
    shutil.rmtree(old)
