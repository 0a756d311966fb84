"""File locks between processes; the lock of a process that dies is released.

The operating system manages the lock (``flock``), so a lock file left by a dead process blocks nobody.  The file
contains a description of the process that holds the lock.  Locks work between machines if the shared file system
supports ``flock`` (NFS from version 4, Lustre with ``-o flock``, Ceph).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

POLL_S = 0.2


class Held(Exception):
    """Error raised when another process holds the lock; the message describes that process."""


@contextmanager
def lock(path: Path, *, wait: bool = True, log: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock at ``path`` inside a ``with`` block; the file is deleted afterwards.

    Parameters
    ----------
    wait : wait until the lock is free; if False, raise ``Held`` at once
    log : function called once with a description of the process that holds the lock, if there is one

    Raises
    ------
    Held
        when another process holds the lock and ``wait`` is False.
    OSError
        when the file cannot be written, for example because the disk is full; the lock is then free.
    """
    file = _taken(path)
    while file is None:
        who = holder(path)
        if not wait:
            raise Held(who)
        if log:
            log(who)
            log = None
        time.sleep(POLL_S)
        file = _taken(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while still locked: waiting processes then see that the file is gone
        os.close(file)


def holder(path: Path) -> str:
    """Return a description of the process that holds the lock."""
    try:
        return path.read_text().strip() or "a process that is just starting"
    except FileNotFoundError:
        return "a process that is just ending"


def held(path: Path) -> str:
    """Return a description of the process that holds the lock, "" if it is free; neither lock nor file is changed."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return holder(path)
    finally:
        os.close(file)


@contextmanager
def folder(path: Path) -> Iterator[bool]:
    """Mark a folder as in use inside a ``with`` block; yield True if no other process has marked it.

    On a file system without locks the value is False.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except OSError:  # locked by another process, or the file system has no locks
        ours = False
    try:
        yield ours
    finally:
        os.close(file)


def _taken(path: Path) -> int | None:
    """Return the open, locked file, or None if another process holds the lock; files of dead processes are reused."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        if _still_there(file, path):
            _sign(file, path)
            return file
        os.close(file)  # the previous holder deleted it between our open and our lock


def _sign(file: int, path: Path) -> None:
    """Write a description of this process into the locked file; if the disk is full, release the lock and raise."""
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()} "
                       f"since {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
    except OSError:
        path.unlink(missing_ok=True)
        os.close(file)
        raise


def _still_there(file: int, path: Path) -> bool:
    try:
        found, ours = path.stat(), os.fstat(file)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
