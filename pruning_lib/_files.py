"""Files: the cache folder, digests, files that appear whole or not at all, downloads."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


def cache() -> Path:
    """Return the folder of downloaded files; the variable ``PRUNING_CACHE`` overrides the default."""
    return Path(os.environ.get("PRUNING_CACHE") or Path.home() / ".cache" / "pruning_lib")


def tree() -> Path:
    """Return the folder with data/inputs, notebooks and book: part of an installed package, else the repository."""
    package = Path(__file__).resolve().parent
    return package / "_tree" if (package / "_tree").is_dir() else package.parent


def digest(content: str | bytes | Path | Iterable[bytes], digits: int = 16) -> str:
    """Return the first hex digits of the SHA-256 of a text, of bytes, of the parts of something, or of a file."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:digits]
    found = hashlib.sha256()
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    for part in parts:
        found.update(part)
    return found.hexdigest()[:digits]


def bytes_of(tensor: Any) -> bytes:
    """Return the bytes of a tensor's values, for a digest."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def readable(folder: Path) -> None:
    """Give a folder and its files the permissions of new ones; safetensors makes files for the owner alone.

    Another account, of a server or a container, would not load such a checkpoint.
    """
    probe = folder / ".new"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for part in [folder, *folder.rglob("*")]:
        part.chmod(mode | (mode & 0o444) >> 2 if part.is_dir() else mode)  # a readable folder can be entered too


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file to; it replaces ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # left over only after an error: a full disk, an interruption


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes ``path`` when the block ends well, unless another process won."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as work:
        done = Path(work) / "done"
        done.mkdir()
        yield done
        if not path.exists():
            done.rename(path)


def download(url: str, path: Path, *, sha256: str, timeout_s: float = 60) -> Path:
    """Fetch ``url`` to ``path`` with a progress bar; an interrupted download is resumed.

    Raises
    ------
    ConnectionError
        when the connection fails; the bytes received stay in a ``.part`` file and the next call resumes from it.
    ValueError
        when the hash of the file differs from ``sha256``; the file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        if url.startswith("file://"):
            shutil.copyfile(urllib.request.url2pathname(url.removeprefix("file://")), part)
        else:
            _stream(url, part, have, timeout_s)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise ConnectionError(f"download of {path.name} stopped: {error}\nRun again to resume it") from error
    check(part, sha256, name=path.name)
    return part.replace(path)


def check(path: Path, sha256: str, *, name: str = "") -> None:
    """Raise ValueError, after deleting the file, unless its SHA-256 begins with ``sha256``."""
    found = digest(path, 64)
    if not found.startswith(sha256):
        path.unlink()
        raise ValueError(f"{name or path.name} is not the file expected (sha256 {found}, wanted {sha256}); it was "
                         f"deleted. Run again; if it happens again, the index serves another file")


def _stream(url: str, part: Path, have: int, timeout_s: float) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        opened = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file is complete already
            return
        raise
    with opened as answer:
        if answer.status != 206:
            have = 0
        total = have + int(answer.headers.get("Content-Length", 0))
        with part.open("ab" if have else "wb") as file, tqdm(
            total=total or None, initial=have, unit="B", unit_scale=True, desc=part.stem
        ) as bar:
            while chunk := answer.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes received")
