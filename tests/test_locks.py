"""Locks exclude other processes, describe their holder, and are released when the holder is killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pruning_lib import _locks

HOLDS = """import sys, time
from pathlib import Path
from pruning_lib import _locks
with _locks.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
COUNTS = """import sys
from pathlib import Path
from pruning_lib import _locks
_locks.POLL_S = 0.001
for _ in range(100):
    with _locks.lock(Path(sys.argv[1])):
        number = int(Path(sys.argv[2]).read_text())
        Path(sys.argv[2]).write_text(str(number + 1))
"""


def start(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "locks" / "row.lock"


@pytest.fixture
def holder(path):
    """Start another process that holds the lock."""
    process = start(HOLDS, path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_holds_it_is_named_and_nobody_else_gets_it(path, holder):
    who = f"process {holder.pid} on .* since 20..-..-.. ..:..:.."
    with pytest.raises(_locks.Held, match=who), _locks.lock(path, wait=False):
        raise AssertionError("both have it")
    assert str(holder.pid) in _locks.held(path)


def test_a_holder_that_is_killed_blocks_nobody(path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert path.exists() and _locks.held(path) == ""  # the file of a dead process is ignored
    with _locks.lock(path, wait=False):
        assert str(os.getpid()) in path.read_text()
    assert not path.exists()


def test_who_waits_is_told_once_for_whom_and_gets_it_afterwards(path, holder):
    said, began = [], time.monotonic()
    threading.Timer(3.5 * _locks.POLL_S, holder.kill).start()
    with _locks.lock(path, log=said.append):
        pass
    assert len(said) == 1 and str(holder.pid) in said[0] and 3 * _locks.POLL_S < time.monotonic() - began < 20


def test_nothing_stays_open_and_nothing_of_an_earlier_holder_stays_in_the_file(path):
    assert _locks.held(path) == ""
    path.parent.mkdir()
    path.write_text("process 1 on another machine, whose name is a long one, since the beginning of all times\n")
    before = os.listdir("/proc/self/fd")
    with _locks.lock(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ") and path.read_text().count("\n") == 1
        os.truncate(path, 0)  # as in the moment after the file is created
        assert _locks.held(path) == "a process that is just starting"
    assert os.listdir("/proc/self/fd") == before


def test_on_a_full_disk_nobody_has_it(small_disk):
    (small_disk / "filler").write_bytes(bytes(2 * 1024 * 1024))  # there is space for the file, but not for its content
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"), _locks.lock(small_disk / "row.lock", wait=False):
            raise AssertionError("who has it could not be said")
        assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_it_is_free_after_an_error(path):
    with pytest.raises(KeyboardInterrupt), _locks.lock(path):
        raise KeyboardInterrupt
    with _locks.lock(path, wait=False):
        assert _locks.held(path)


def test_a_file_deleted_between_opening_and_locking_it_is_not_taken_for_the_lock(path, monkeypatch):
    real, calls = _locks.fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.unlink()  # as its holder does at the end
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(_locks.fcntl, "flock", flock)
    with _locks.lock(path), pytest.raises(_locks.Held), _locks.lock(path, wait=False):
        raise AssertionError("both have it")


def test_of_three_processes_none_ever_has_it_together_with_another(path, tmp_path):
    """Count with three processes, each of which deletes the lock file while the others wait."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNTS, path, counter) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert counter.read_text() == "300"
