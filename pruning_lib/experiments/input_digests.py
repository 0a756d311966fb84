"""Digests of the input files of a row, in addition to its notebook and code.

Only local files are considered.  Downloads are pinned by a hash in the code; a run writes fingerprints of data from a
hub into its record.
Order of this file: files · digests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pruning_lib._extras import extra
from pruning_lib._files import cache, digest, replacing
from pruning_lib.experiments.runs import Row, Tree, parameters_of, source

with extra("report"):
    import nbformat

SMALL_BYTES = 1 << 20  # digests of larger files are cached
IMAGE_FOLDERS = {"cifar10": "cifar10"}  # image set -> folder under PRUNING_DATA
LENT = ("PRUNING_DATA", "PRUNING_MODELS")  # variables that name local folders used instead of downloads


def digests_of(row: Row, tree: Tree) -> dict[str, str]:
    """Return name -> digest of the input files of a row.

    Inputs are files of ``data/inputs`` named by parameters or cells, and folders named by parameters: of a model, by
    path or under ``PRUNING_MODELS``, and of a data set, under ``PRUNING_DATA``.
    """
    notebook = source(row, tree)
    texts = [value for value in {**parameters_of(notebook), **row.parameters}.values() if isinstance(value, str)]
    cells = "\n".join(c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code")
    files = sorted((tree.notebooks.parent / "data" / "inputs").glob("*.*"))
    found = {path.name: digest_of(path) for path in files if path.stem in texts or path.name in cells}
    for text in filter(None, texts):
        found.update({name: _of_folder(folder) for name, folder in _folders(text)})
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return names of inputs that changed or vanished; local folders of another machine are ignored."""
    lent_elsewhere = [name for name in before if name not in now and name.endswith(LENT)]
    return sorted(name for name, found in before.items() if now.get(name) != found and name not in lent_elsewhere)


def _folders(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, folder) for the text of a parameter, resolved as in ``models`` and ``data``."""
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
    from pruning_lib.data.text import DATASETS  # imports torch, so only when needed

    return DATASETS[text].folder if text in DATASETS else IMAGE_FOLDERS.get(text)


# --- digests ----------------------------------------------------------------------------------------------------------


def digest_of(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file.

    Digests of large files are cached under path, size and modification time.  Copying or touching a file does not
    change its digest.
    """
    about = path.stat()
    if about.st_size <= SMALL_BYTES:
        return digest(path)
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    remembered = cache() / "digests" / digest(key, 32)
    if remembered.is_file() and len(found := remembered.read_text()) == 16:
        return found
    found = digest(path)
    with suppress(OSError), replacing(remembered) as beside:  # without a cache it is computed again next time
        beside.write_text(found)
    return found


def _of_folder(folder: str) -> str:
    """Return one digest of all files in a folder."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return digest("\n".join(f"{path.name} {digest_of(path)}" for path in paths))
