"""The Chromium that the tests of pages drive, if there is one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NO_BROWSER = "no chromium here to read the book in; on Debian: apt-get install --no-install-recommends chromium"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


@contextmanager
def launched() -> Iterator[Browser]:
    """Yield a browser and close it at the end; skip the test where there is none.

    Only one may be open in a process, so a fixture that uses this has the scope of a module.
    """
    if CHROMIUM is None:
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()
