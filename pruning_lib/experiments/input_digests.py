"""What a row reads besides its notebook and code: which files these are, and a digest of each.

Only what lies at hand is looked at.  What is fetched once is pinned by its hash in the code; what a hub serves is
fingerprinted by the run itself, in its record.
Order of this file: which · digests.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import nbformat

from pruning_lib._files import cache
from pruning_lib.experiments.runs import Row, Tree, parameters_of, source

SMALL_BYTES = 1 << 20  # the digest of a larger file is remembered
IMAGE_FOLDERS = {"cifar10": "cifar10", "cifar10-jpeg75": "cifar10-jpeg"}  # image set -> folder under PRUNING_DATA
LENT = ("PRUNING_DATA", "PRUNING_MODELS")  # name folders of this machine that stand in for downloads


def digests_of(row: Row, tree: Tree) -> dict[str, str]:
    """Name -> digest of the files a row reads.

    These are files of ``data/inputs`` that parameters or cells name, and folders that parameters name: of a model, by
    its path or under ``PRUNING_MODELS``, and of a data set under ``PRUNING_DATA``.
    """
    notebook = source(row, tree)
    texts = [value for value in {**parameters_of(notebook), **row.parameters}.values() if isinstance(value, str)]
    cells = "\n".join(c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code")
    files = sorted((tree.notebooks.parent / "data" / "inputs").glob("*.*"))
    found = {path.name: digest(path) for path in files if path.stem in texts or path.name in cells}
    for text in filter(None, texts):
        found.update({name: _of_folder(folder) for name, folder in _folders(text)})
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the inputs that are others now, or gone; a folder that only another machine lends says nothing."""
    lent_elsewhere = [name for name in before if name not in now and name.endswith(LENT)]
    return sorted(name for name, found in before.items() if now.get(name) != found and name not in lent_elsewhere)


def _folders(text: str) -> Iterator[tuple[str, str]]:
    """(name, folder) of what a parameter's text stands for, as ``models`` and ``data`` would find it."""
    lent = {name: os.environ.get(name) for name in LENT}
    data_set = _data_folder(text) if lent["PRUNING_DATA"] else None
    samples = os.path.join(lent["PRUNING_DATA"] or "", data_set or "", "data")
    if data_set and os.path.isdir(samples):
        yield f"{text} in PRUNING_DATA", samples
    model = os.path.join(lent["PRUNING_MODELS"] or "", text)
    if lent["PRUNING_MODELS"] and not os.path.isabs(text) and os.path.isdir(model):
        yield f"{text} in PRUNING_MODELS", model
    elif any(os.path.isfile(os.path.join(text, name)) for name in ("config.json", "model.safetensors")):
        yield text, text


def _data_folder(text: str) -> str | None:
    from pruning_lib.data.text import DATASETS  # with torch, which the process of a row can do without

    return DATASETS[text].folder if text in DATASETS else IMAGE_FOLDERS.get(text)


# --- digests ----------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file.

    That of a large one is remembered in the cache under the file's place, size and time, so that asking again costs
    nothing; a file that was only copied or touched still has the digest it had.
    """
    about = path.stat()
    if about.st_size <= SMALL_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    remembered = cache() / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if remembered.is_file() and len(found := remembered.read_text()) == 16:
        return found
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    _remember(remembered, found)
    return found


def _remember(path: Path, text: str) -> None:
    """Whole or not at all; where the cache cannot be written, the digest is computed again next time."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _of_folder(folder: str) -> str:
    """Of the files in a folder, in one."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return hashlib.sha256("\n".join(f"{path.name} {digest(path)}" for path in paths).encode()).hexdigest()[:16]
