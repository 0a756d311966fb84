"""Two processes that want the same cached result: the second has to wait, and to make it only if the first dies."""

import multiprocessing
import sys
import time


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _wants(ask, folder, name):
    """Ask for the result in a separate process, and wait inside ``make`` while the file ``slow`` exists."""
    def make():
        (folder / f"begun-{name}").touch()
        until(lambda: not (folder / "slow").exists())
        return name

    sys.stderr = (folder / f"said-{name}").open("w", buffering=1)
    (folder / f"got-{name}").write_text(ask(make))


def check_that_the_second_waits(ask, folder, *, first_dies):
    """Require that of two processes the second waits for the first, and makes the result only if the first dies.

    ``ask(make)`` asks the cache for a result that ``make()`` makes by the process of that name, and returns the name.
    """
    first, second = (multiprocessing.get_context("fork").Process(target=_wants, args=(ask, folder, name))
                     for name in ("first", "second"))
    (folder / "slow").touch()
    first.start()
    until((folder / "begun-first").exists)
    second.start()
    said = folder / "said-second"
    until(lambda: said.exists() and f"process {first.pid}" in said.read_text())  # it waits and names the other process
    assert not (folder / "begun-second").exists()
    if first_dies:
        first.kill()
    (folder / "slow").unlink()
    second.join(30)
    first.join(30)
    assert (folder / "got-second").read_text() == ("second" if first_dies else "first")
    assert (folder / "begun-second").exists() == first_dies
