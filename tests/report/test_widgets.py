"""Figures to play with: their numbers equal those of the library, and the keyboard moves them."""

import importlib.util
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from chromium import launched

from pruning_lib.pruning import consensus, similarity

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = "".join(f"<script>{(ROOT / 'book' / '_static' / name).read_text()}</script>"
                  for name in ("metrics.js", "widgets.js"))


@pytest.fixture(scope="module")
def widgets():
    """Return the module that draws the figures, with the published records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_RESULTS", str(ROOT / "data" / "results"))
        spec = importlib.util.spec_from_file_location("widgets", ROOT / "book" / "drawings" / "widgets.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def open_widget(browser, widgets):
    """Return a function that shows one figure, with or without its script."""
    pages = []

    def show(name, scripts=SCRIPTS):
        page = browser.new_page()
        pages.append(page)
        page.set_content(f"<!DOCTYPE html><html><body>{widgets.WIDGETS[name]()}{scripts}</body></html>")
        return page

    yield show
    for page in pages:
        page.close()


def clouds():
    """Yield pairs of clouds and labels: random ones, and changes that some metrics ignore."""
    draw = torch.Generator().manual_seed(0)
    for number in (6, 15, 30):
        labels = torch.arange(number) % 3
        x = 2 * torch.randn(number, 2, generator=draw, dtype=torch.float64) + labels[:, None]
        y = torch.randn(number, 2, generator=draw, dtype=torch.float64)
        for changed in (y, x + 0.3 * y, 2 * x, x[:, [1, 0]], x @ torch.tensor([[1.5, 0.4], [-0.2, 0.6]]).double(), x):
            yield x, changed, labels


def test_the_metrics_of_the_browser_equal_those_of_the_library(open_widget):
    page = open_widget("votes")
    for x, y, labels in clouds():
        found = page.evaluate("([x, y, labels]) => pruningMetrics.distances(x, y, labels)",
                              [x.tolist(), y.tolist(), labels.tolist()])
        wanted = {name: d.item() for name, d in similarity.distances(x, [y], labels).items()}
        assert list(found) == list(similarity.PAPER_METRICS)
        assert found == pytest.approx(wanted, abs=2e-6)  # the library's Gaussian search is an upper bound


@pytest.mark.parametrize("seed", range(4))
def test_the_rank_sums_of_the_browser_equal_those_of_the_library(open_widget, seed):
    values = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(seed)).tolist()  # with ties
    found = open_widget("votes").evaluate("rows => pruningMetrics.rankSums(rows)", values)
    assert found == consensus.ranks(pd.DataFrame(values)).sum(axis=1).tolist()


def test_perplexity_is_that_of_the_records_and_follows_the_slider(open_widget, widgets):
    record = json.loads((ROOT / "data" / "results" / "recipe-amp-sequential-30-neurons.json").read_text())
    page = open_widget("perplexity")
    page.locator("input[type=range]").focus()
    page.keyboard.press("End")
    bars = page.locator(".bars p").all_inner_texts()
    assert page.locator("output").inner_text() == "30 %" and len(bars) == len(widgets.WAYS) <= 6
    assert widgets.number(record["values"]["perplexity"]) in bars[0]
    page.keyboard.press("Home")
    assert all("18.3" in text for text in page.locator(".bars p").all_inner_texts())
    page.keyboard.press("ArrowRight")
    assert "not measured" in page.locator(".bars p").first.inner_text()


def test_a_run_without_a_record_is_said_to_be_missing(widgets, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_RESULTS", str(tmp_path))
    assert widgets.perplexity().count("<td>not measured</td>") == len(widgets.WAYS) * len(widgets.FRACTIONS)


def numbers_of(page):
    return page.locator("[data-metric] td:nth-child(2)").all_inner_texts()


def test_without_a_script_each_figure_is_whole_and_with_it_the_same(open_widget, widgets):
    for name in widgets.WIDGETS:
        still, alive = open_widget(name, scripts=""), open_widget(name)
        assert "alive" not in (still.locator(".widget").get_attribute("class"))
        assert len(still.locator("table").inner_text()) > 100
        if name == "cloud":
            assert [float(text) for text in numbers_of(still)] == pytest.approx(
                [float(text) for text in numbers_of(alive)], abs=0.011)
        if name == "votes":
            assert still.locator(".said").inner_text() == alive.locator(".said").inner_text()
            assert still.locator(".sum").all_inner_texts() == alive.locator(".sum").all_inner_texts()


def test_buttons_show_which_changes_a_metric_ignores(open_widget):
    page = open_widget("cloud")

    def ignoring(change):
        page.locator("[data-change=reset]").press("Enter")
        page.locator(f"[data-change={change}]").press("Enter")
        return set(page.eval_on_selector_all("tr.ignored", "rows => rows.map(row => row.dataset.metric)"))

    every = set(similarity.PAPER_METRICS)
    assert ignoring("reset") == every
    assert ignoring("turn") == every - {"permutation", "wasserstein"}
    assert ignoring("double") == {"cka", "permutation", "linear_shape_0", "linear_shape_1"}
    assert ignoring("rename") == every
    assert ignoring("stretch") == {"linear_shape_0"}
    assert ignoring("shuffle") == {"wasserstein"}


def test_a_point_is_moved_with_the_keyboard_and_with_the_mouse(open_widget, widgets):
    page = open_widget("cloud")
    page.locator("[data-change=reset]").press("Enter")
    page.locator("svg").focus()
    page.keyboard.press("PageDown")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    said = page.locator(".said").inner_text()
    assert said.startswith("Point 2 of class 2") and "0.000" not in numbers_of(page)
    place = page.locator(".moved").nth(4).bounding_box()
    page.mouse.move(place["x"] + 5, place["y"] + 5)
    page.mouse.down()
    page.mouse.move(place["x"] + 65, place["y"] + 45)
    page.mouse.up()
    now = page.locator(".moved").nth(4).bounding_box()
    assert now["x"] - place["x"] == pytest.approx(60, abs=8) and now["y"] - place["y"] == pytest.approx(40, abs=8)
    before = page.locator(".moved").nth(4).get_attribute("transform")
    page.locator("select").select_option("all")
    page.locator("svg").focus()
    page.keyboard.press("ArrowUp")
    after = page.locator(".moved").nth(4).get_attribute("transform")
    moved = float(re.findall(r"[\d.]+", before)[1]) - float(re.findall(r"[\d.]+", after)[1])
    assert moved == pytest.approx(0.2 * widgets.UNIT, abs=0.2)


def test_votes_follow_distances_and_switches(open_widget):
    page = open_widget("votes")
    page.get_by_label("distance of block c, metric 3").fill("0.1")
    assert page.locator(".said").inner_text().startswith("Block c is removed first: its ranks add up to 2")
    page.get_by_label("metric 3", exact=True).uncheck()
    assert page.locator(".sum").all_inner_texts() == ["2", "2", "2", "6"]
    assert "a and b and c have the lowest sum, 2; the earlier one, a" in page.locator(".said").inner_text()
