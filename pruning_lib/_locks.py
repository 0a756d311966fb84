"""One at a time, between processes: a lock that its holder's death opens.

The operating system holds the lock (``flock``), so nobody has to decide whether a lock file was left by a dead process.
The file says in words who holds it.  The lock works between machines where the shared file system passes ``flock`` on
(NFS from version 4, Lustre with ``-o flock``, Ceph).
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
    """Somebody else has the lock; the message says who."""


@contextmanager
def lock(path: Path, *, wait: bool = True, log: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock at ``path`` for the time of a block; the file goes afterwards.

    Parameters
    ----------
    wait : until it is free; otherwise ``Held`` is raised at once
    say : told once who is waited for

    Raises
    ------
    Held
        when somebody has it and ``wait`` is off.
    OSError
        when the file cannot be written, the disk being full for example; nobody has the lock then.
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
        path.unlink(missing_ok=True)  # while it is still held: who waits for this file sees that it is gone
        os.close(file)


def holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        return path.read_text().strip() or "a process that is just starting"
    except FileNotFoundError:
        return "a process that is just ending"


def held(path: Path) -> str:
    """Who holds the lock, or nothing when it is free; it is not taken, and a file left by a dead process stays."""
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
    """Mark a folder as in use for the time of a block; whether nobody else had, as far as the file system can tell."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except OSError:  # somebody has it, or this file system has no locks
        ours = False
    try:
        yield ours
    finally:
        os.close(file)


def _taken(path: Path) -> int | None:
    """The open file with the lock, or None when somebody has it; a file of a dead process is taken over."""
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
        os.close(file)  # its holder deleted it between our opening and our locking


def _sign(file: int, path: Path) -> None:
    """Write into the locked file who has it; on a disk that is too full for that the lock is given back."""
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
