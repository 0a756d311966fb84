"""Python cells in the reader's browser: they run as printed, and agree with the library."""

import functools
import html
import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from chromium import launched

from pruning_lib.pruning import consensus, similarity
from pruning_lib.report import browser_python

ROOT = Path(__file__).resolve().parents[2]
LIVE = ROOT / "book" / "_static" / "live"
CELL = re.compile(r"```\{code-block\} python\n:class: live\n\n(.*?)```\n\n"
                  r"```\{code-block\} text\n:class: live-output\n\n(.*?)```", re.S)
CELLS = CELL.findall((ROOT / "book" / "chapters" / "in_browser.md").read_text())


@pytest.fixture(scope="module")
def small():
    spec = importlib.util.spec_from_file_location("small", LIVE / "small.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", range(len(CELLS)))
def test_a_cell_prints_the_output_below_it(place, tmp_path):
    code, wanted = CELLS[place]
    shutil.copyfile(LIVE / "small.py", tmp_path / "small.py")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == wanted and not done.stderr


def test_there_are_cells_and_every_one_has_its_output():
    text = (ROOT / "book" / "chapters" / "in_browser.md").read_text()
    assert len(CELLS) == text.count(":class: live\n") == text.count(":class: live-output\n") > 5


def test_the_small_metrics_equal_those_of_the_library(small):
    assert list(small.METRICS) == list(similarity.PAPER_METRICS)
    for seed, number in enumerate((6, 12, 30)):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.arange(number) % 3
        x = 2 * torch.randn(number, 2, generator=draw, dtype=torch.float64) + labels[:, None]
        for y in (torch.randn(number, 2, generator=draw, dtype=torch.float64), 2 * x, x.flip(1) + 1, x):
            wanted = {name: d.item() for name, d in similarity.distances(x, [y], labels).items()}
            found = {name: metric(x.tolist(), y.tolist(), labels.tolist()) for name, metric in small.METRICS.items()}
            assert found == pytest.approx(wanted, abs=2e-6)


def test_the_small_rank_sums_equal_those_of_the_library(small):
    values = torch.randint(0, 4, (5, 3), generator=torch.Generator().manual_seed(0))  # with ties
    table = pd.DataFrame(values.tolist(), index=[*"abcde"])
    assert small.rank_sums(table.T.to_dict("list")) == consensus.ranks(table).sum(axis=1).to_dict()


# --- in a browser -----------------------------------------------------------------------------------------------------


def page_of(code):
    return ("<!DOCTYPE html><html><body>" + f"<div class='live'><pre>{html.escape(code)}</pre></div>"
            "<div class='live-output'><pre></pre></div><script src='_static/live.js'></script></body></html>")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Serve a folder with the scripts of the book; yield the folder and its address."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "book" / "_static" / "live", folder / "_static" / "live")
    shutil.copyfile(ROOT / "book" / "_static" / "live.js", folder / "_static" / "live.js")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


def output_of(page, wanted, seconds=60):
    page.wait_for_function("wanted => document.querySelector('.live-output pre').textContent.includes(wanted)",
                           arg=wanted, timeout=1000 * seconds)
    return page.locator(".live-output pre").inner_text()


def test_a_book_without_python_says_so(browser, site, tmp_path_factory):
    folder, address = site
    if (folder / "_static" / "pyodide").exists():
        shutil.rmtree(folder / "_static" / "pyodide")
    (folder / "page.html").write_text(page_of("print(1)"))
    page = browser.new_page()
    page.goto(address + "page.html")
    page.get_by_role("button", name="Run").click()
    assert "without Python" in output_of(page, "This copy")
    page.close()


def test_every_cell_runs_in_the_browser_and_asks_nobody_else(browser, site):
    folder, address = site
    try:
        browser_python.ship(folder / "_static" / "pyodide")
    except ConnectionError as error:
        pytest.skip(f"the package index is out of reach, so there is no Python for browsers: {error}")
    (folder / "page.html").write_text(page_of(CELLS[0][0]))
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address + "page.html")
    area = page.get_by_label("Python code, cell 1")
    for code, wanted in CELLS:
        area.fill(code)
        area.press("Control+Enter")
        assert output_of(page, wanted.rstrip("\n").splitlines()[-1]) == wanted.rstrip("\n")
    area.fill("x = 1\nprint(x / 0)")
    page.get_by_role("button", name="Run").click()
    assert "line 2" in output_of(page, "ZeroDivisionError")
    area.fill("while True: pass")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("button", name="Stop").click()
    assert output_of(page, "Stopped.") == "Stopped."
    area.fill("print('again')")
    page.get_by_role("button", name="Run").click()
    assert output_of(page, "again") == "again"
    page.get_by_role("button", name="Restore").click()
    assert area.input_value() == CELLS[0][0].rstrip("\n")
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    page.close()
