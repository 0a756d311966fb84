"""The built book in a browser, on a laptop and on a phone, with keyboard and screen reader."""

import base64
import functools
import http.server
import io
import json
import os
import re
import threading
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import numpy as np
import pytest
from chromium import CHROMIUM, NO_BROWSER, launched
from PIL import Image

from pruning_lib.experiments import runs
from pruning_lib.experiments.runs import Tree
from pruning_lib.report import book, slides

ROOT = Path(__file__).resolve().parents[2]
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# one page of each kind, for the looks that are not measured on every page
KINDS = ["chapters/intro", "chapters/amp", "chapters/consensus", "chapters/in_browser", "chapters/claims",
         "chapters/runs", "executed/amp_against_size", "executed/amp-20"]
LOOKS = [{"color_scheme": scheme, "viewport": size} for scheme in ("light", "dark") for size in (LAPTOP, PHONE)]
SERIOUS = {"serious", "critical"}
THEMES_OWN: dict[str, str] = {}  # rule of axe -> reason for a violation by the theme that we cannot fix


# --- the book, a server, a browser ------------------------------------------------------------------------------------


def changed():
    """Return the time of the latest change of the book's sources."""
    files = [path for path in (ROOT / "book").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files += [*(ROOT / "pruning_lib").glob("*.py"), ROOT / "notebooks" / "runs.yml"]
    return max(path.stat().st_mtime for path in files)


@pytest.fixture(scope="session")
def html():
    """Return the folder of the published report, rebuilt if a source is newer; every warning is an error."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail(NO_BROWSER)
        pytest.skip(NO_BROWSER)
    index = ROOT / "build" / "report" / "book" / "_build" / "html" / "index.html"
    if not index.is_file() or index.stat().st_mtime < changed():
        index = book.build_book(ROOT)
    return index.parent


@pytest.fixture(scope="session")
def address(html):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(html):
    with launched() as browser:
        yield browser


@pytest.fixture
def sheet(browser, request):
    """Return an empty page of the browser; parameters are those of a browser context."""
    context = browser.new_context(**{"viewport": LAPTOP, **getattr(request, "param", {})})
    yield context.new_page()
    context.close()


@pytest.fixture(scope="session")
def names(html):
    """Return the path of every page of the site; the first one is a redirect."""
    found = sorted(str(path.relative_to(html)) for path in html.rglob("*.html") if "_static" not in path.parts)
    found.remove("index.html")
    assert len(found) > 30 and "chapters/amp.html" in found
    return found


# --- every page -------------------------------------------------------------------------------------------------------

# parts that are cut off: code that overflows, and tables or results that scroll without a visible bar and a hint
CUT = """function cut() {
  const shown = (e) => e.getClientRects().length > 0, name = (e) => e.outerHTML.slice(0, 80);
  const code = [...document.querySelectorAll("main article pre")].filter(shown)
    .filter((e) => !e.closest(".output") && e.scrollWidth > e.clientWidth + 1);
  const boxes = [...document.querySelectorAll("main article table, main .output pre")].filter(shown)
    .map((e) => e.tagName === "PRE" ? e : e.parentElement);
  const wide = boxes.filter((e) => e.scrollWidth > e.clientWidth + 1 && !(e.tabIndex === 0
    && e.offsetHeight > e.clientHeight && e.previousElementSibling?.matches(".scroll-hint")));
  return [...code, ...wide].map(name);
}"""
CALM = """async () => {""" + CUT + """
  for (let tries = 0, calm = 0; tries < 40; tries++) {  // the layout follows the window and the fonts a little later
    await new Promise((done) => setTimeout(done, 50));
    calm = cut().length ? 0 : calm + 1;
    if (calm === 2) return [];
  }
  return cut();
}"""
LOOK = """() => { return {
  images: [...document.images].map(i => [i.getAttribute("src"), i.complete && i.naturalWidth, i.alt]),
  bare: [...document.querySelectorAll("main article img:not(.toggler)")].filter(
    i => !i.closest("figure")?.querySelector(":scope > figcaption .caption-number")).map(i => i.getAttribute("src")),
  links: [...document.querySelectorAll("a[href]")].map(a => a.href),
  ids: [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name),
  wider: Math.max(...["html", "main", ".bd-article-container", ".bd-article"].map(part => document.querySelector(part))
    .filter(part => part).map(part => part.scrollWidth - Math.min(part.clientWidth, innerWidth))),
  wide: [...document.querySelectorAll("main :not(pre *)")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 5).map(e => e.outerHTML.slice(0, 80)),
  seconds: performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd / 1000,
};}"""


@pytest.fixture(scope="module")
def seen(browser, address, names):
    """Return name -> findings on a page at phone width; a laptop's width hides overflow."""
    context = browser.new_context(viewport=PHONE)
    page, found = context.new_page(), {}
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("requestfailed", lambda request: None if request.failure == "net::ERR_ABORTED"  # the reader went on
            else trouble.append(f"failed: {request.url}"))
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:"))
            else trouble.append(f"leaves the site: {request.url}"))
    for name in names:
        trouble.clear()
        answer = page.goto(address + name, wait_until="load")
        settled(page)
        found[name] = {"url": page.url, "status": answer.status, **page.evaluate(LOOK), "trouble": list(trouble)}
        found[name]["cut"] = page.evaluate(CALM)
        page.set_viewport_size(LAPTOP)
        found[name]["cut"] += page.evaluate(CALM)
        page.set_viewport_size(PHONE)
    context.close()
    return found


def settled(page):
    """Wait until the formulas of the page are rendered."""
    page.evaluate("() => window.MathJax && MathJax.startup && MathJax.startup.promise")


def those(seen, wrong):
    """Return the pages with findings of ``wrong``, and the findings."""
    return {name: found for name, page in seen.items() if (found := wrong(page))}


def test_every_page_answers_and_reports_no_error_and_asks_nobody_else(seen):
    assert not those(seen, lambda page: page["status"] not in (200, 304))
    assert not those(seen, lambda page: page["trouble"])


def test_every_image_is_there_and_every_figure_is_described(seen):
    assert sum(len(page["images"]) for page in seen.values()) > 60
    assert not those(seen, lambda page: [source for source, width, _ in page["images"] if not width])
    assert not those(seen, lambda page: [source for source, _, alt in page["images"]
                                         if len(alt) < (20 if "_images/" in source else 1) or "_images/" in alt])


def test_every_figure_has_a_number_and_a_caption(seen):
    assert not those(seen, lambda page: page["bare"])


def test_no_page_is_wider_than_a_phone(seen):
    assert not those(seen, lambda page: page["wide"] or ["?"] if page["wider"] > 0 else None)


def test_every_link_inside_the_book_leads_to_a_page_and_to_a_place_on_it(seen, address, html):
    ids = {page["url"]: set(page["ids"]) for page in seen.values()}
    broken = {}
    for name, page in seen.items():
        for link in set(page["links"]):
            target, place = urldefrag(urljoin(page["url"], link))
            if not target.startswith(address):
                continue
            file = html / unquote(target.removeprefix(address)).split("?")[0]
            lost = not (file / "index.html" if file.is_dir() else file).is_file()
            if lost or (place and target in ids and unquote(place) not in ids[target]):
                broken.setdefault(name, []).append(link.removeprefix(address))
    assert not broken


def test_pages_and_site_stay_small_and_quick(seen, html):
    assert not [path.name for path in (html / "executed").glob("*.html") if path.stat().st_size > 1e6]
    files = [path for path in html.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert sorted(page["seconds"] for page in seen.values())[len(seen) // 2] < 3


def test_no_code_is_cut_off_and_wide_tables_say_that_they_scroll(seen):
    assert not those(seen, lambda page: page["cut"][:3])


# --- finding the way --------------------------------------------------------------------------------------------------


def test_search_shows_each_page_once_and_chapters_first(sheet, address):
    sheet.goto(address + "search.html?q=perplexity")
    sheet.wait_for_function("() => /found/.test(document.querySelector('#search-results .search-summary')?.innerText)")
    found = [urldefrag(link)[0].split("?")[0].removeprefix(address) for link in
             sheet.eval_on_selector_all("#search-results ul.search > li > a", "all => all.map(a => a.href)")]
    assert len(found) > 20 and len(found) == len(set(found))
    kinds = [0 if name.startswith("chapters/") else 1 if "_" in name else 2 for name in found if name[:4] in ("chap",
                                                                                                            "exec")]
    assert kinds[0] == 0 and kinds.index(2) > max(place for place, kind in enumerate(kinds) if kind == 0)


def test_the_side_bar_has_no_runs_and_stands_at_the_page(sheet, address):
    for name, current in (("executed/recovery_compared", "recovery_compared.html"),
                          ("executed/recipe-amp-sequential-20", "runs.html")):
        sheet.goto(f"{address}{name}.html")
        links = sheet.locator(".bd-sidebar-primary nav.bd-links a.reference")
        assert links.count() < 60
        active = sheet.locator(".bd-sidebar-primary li.active > a").last
        assert active.evaluate("a => a.href").endswith(current) or active.get_attribute("href") == "#"
        place = active.bounding_box()
        assert 0 < place["y"] < LAPTOP["height"] - place["height"]


def test_a_run_says_which_one_it_is_and_leads_back_to_the_list(sheet, address):
    sheet.goto(address + "executed/recipe-amp-sequential-20.html")
    title = sheet.locator("article h1").inner_text().replace("\xa0", " ")
    assert title.startswith("recipe-amp-sequential-20: ") and "20 % removed" in title and "sequential" in title
    sheet.locator(".run-of a").click()
    assert sheet.url.endswith("chapters/runs.html")


def test_the_list_of_runs_is_filtered_with_the_keyboard_and_whole_without_scripts(sheet, address, browser):
    sheet.goto(address + "chapters/runs.html")
    rows = sheet.locator(".run-index tbody tr")
    everything = rows.count()
    sheet.locator("select[name=removed]").select_option("30 %")
    sheet.locator("input[name=words]").focus()
    sheet.keyboard.type("recipe amp sequential")
    shown = sheet.locator(".run-index tbody tr:visible").all_inner_texts()
    assert shown and all("30\xa0%" in text and "sequential" in text for text in shown) and len(shown) < everything / 5
    assert sheet.locator(".run-filters + p").inner_text() == f"{len(shown)} of {everything} runs"
    with browser.new_context(java_script_enabled=False) as context:
        plain = context.new_page()
        plain.goto(address + "chapters/runs.html")
        assert plain.locator(".run-index tbody tr:visible").count() == everything
        assert not plain.locator(".run-filters").count()


@pytest.mark.parametrize("sheet", [{"viewport": PHONE}], indirect=True)
def test_on_a_phone_a_claim_is_a_card(sheet, address):
    sheet.goto(address + "chapters/claims.html")
    claim, number, verdict = (sheet.locator(".cards tbody tr").first.locator(f"td:nth-child({n})") for n in (1, 2, 3))
    places = [cell.bounding_box() for cell in (claim, number, verdict)]
    assert places[0]["y"] < places[1]["y"] < places[2]["y"] and all(place["width"] > 250 for place in places)
    assert verdict.get_attribute("data-label") == "verdict"


# --- reading ----------------------------------------------------------------------------------------------------------


def test_search_finds_heads_and_leads_to_their_chapter(sheet, address):
    sheet.goto(address + "search.html?q=head")
    sheet.wait_for_selector("#search-results li a")
    assert "AMP: heads and neurons" in sheet.locator("#search-results").inner_text()
    sheet.locator("#search-results li a", has_text="AMP: heads and neurons").first.click()
    assert "/chapters/amp.html" in sheet.url


def test_a_notebook_can_be_downloaded_from_the_page_made_of_it(sheet, address):
    sheet.goto(address + "executed/amp-20.html")
    with sheet.expect_download() as wanted:
        sheet.locator(".run-it a", has_text="Download").click()
    paths = Path(wanted.value.path()), ROOT / "book" / "executed" / "amp-20.ipynb"
    (got, seen), (made, drawn) = (without_figures(json.loads(path.read_text())) for path in paths)
    del made["metadata"]["pruning_lib"]["code"]  # digests are for the runner, not for readers
    for notebook in (got, made):  # prose is that of today's notebook, which another test compares
        notebook["cells"] = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert got == made
    for one, other in zip(seen, drawn, strict=True):  # of 256 levels a pixel may be off by one on average
        assert one.shape == other.shape and abs(one.astype(int) - other).mean() < 1
    assert sheet.locator(".run-it code").first.inner_text() == "pruning-lib run amp-20"


def without_figures(notebook):
    """Return a notebook without its figures, and the figures' pixels (height, width, 3)."""
    shown = [output["data"] for cell in notebook["cells"] for output in cell.get("outputs", [])
             if "image/png" in output.get("data", {})]
    files = [io.BytesIO(base64.b64decode("".join(found.pop("image/png")))) for found in shown]
    return notebook, [np.asarray(Image.open(file).convert("RGB")) for file in files]


def cells(table, column):
    return table.locator(f"tbody tr > :nth-child({column})").all_inner_texts()


def test_a_result_table_is_sorted_with_the_keyboard_and_comes_back(sheet, address):
    sheet.goto(address + "executed/amp_against_size.html")
    table = sheet.locator("main .cell_output table").filter(has=sheet.locator("th button")).first
    button = table.locator("th button", has_text="20\u00a0% removed")
    column = 1 + button.evaluate("b => b.closest('th').cellIndex")
    before = cells(table, column)
    orders = []
    for _ in range(3):
        button.focus()
        sheet.keyboard.press("Enter")
        orders.append((button.evaluate("b => b.closest('th').ariaSort"), cells(table, column)))
    assert [order for order, _ in orders] == ["ascending", "descending", None]
    filled = [[text for text in texts if text.strip()] for _, texts in orders]
    assert filled[0] == filled[1][::-1] and orders[0][1] != orders[1][1] and orders[2][1] == before


@pytest.mark.parametrize("sheet", [{"viewport": {"width": 1280, "height": 720}}], indirect=True)
def test_no_slide_overflows_and_notes_are_shown_on_demand(sheet, address):
    sheet.goto(address + "slides.html", wait_until="load")
    settled(sheet)
    over = sheet.evaluate("""() => [...document.querySelectorAll("section")].filter(slide => {
      const box = slide.getBoundingClientRect();
      return [...slide.querySelectorAll("*:not(mjx-container *):not(svg *)")].some(part => {
        const place = part.getBoundingClientRect();
        return place.width && (place.bottom > box.bottom - 8 || place.top < box.top || place.right > box.right);
      });
    }).map(slide => slide.querySelector("h1, h2").textContent)""")
    assert not over
    notes = sheet.locator("aside.notes").first
    assert not notes.is_visible()
    sheet.keyboard.press("n")
    assert notes.is_visible()


def test_slides_become_a_pdf_with_a_page_for_each(html, tmp_path):
    text = slides.pdf(html / "slides.html", tmp_path / "slides.pdf").read_bytes()
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", text)
    assert len(pages) == (html / "slides.html").read_text().count("<section>")
    assert set(re.findall(rb"/MediaBox \[0 0 ([\d.]+ [\d.]+)\]", text)) == {b"960 540"}  # 1280 x 720 pixels, in points


@pytest.mark.parametrize("sheet", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_tables_are_plain_and_the_map_stands_still(sheet, address):
    sheet.goto(address + "executed/amp_against_size.html")
    assert sheet.locator("main .cell_output table td").count() and not sheet.locator("th button").count()
    sheet.goto(address + "chapters/amp.html")
    figure = sheet.locator("#head-map")
    assert not figure.locator("input").first.is_visible() and figure.locator("rect.gone").count() == 90
    assert "20.0 % of all parameters" in figure.locator(".said").inner_text()


def test_the_map_of_heads_follows_slider_and_choice_with_the_keyboard_alone(sheet, address):
    sheet.goto(address + "chapters/amp.html")
    figure = sheet.locator("#head-map")
    slider = figure.locator("input[type=range]")
    at_first = figure.locator(".said").inner_text()
    assert figure.locator("rect.gone").count() == 90  # three of nine heads in each of thirty blocks
    slider.focus()
    sheet.keyboard.press("End")
    assert figure.locator("output").inner_text() == "50 %" and figure.locator("rect.gone").count() == 180
    assert figure.locator(".said").inner_text() != at_first
    sheet.keyboard.press("Home")
    assert figure.locator("rect.gone").count() == 0 and figure.locator(".curtain").get_attribute("width") == "0"
    figure.locator("input[type=radio]").first.focus()
    sheet.keyboard.press("ArrowDown")
    slider.focus()
    for _ in range(20):
        sheet.keyboard.press("ArrowRight")
    assert figure.locator("rect.gone").count() == 0 and float(figure.locator(".curtain").get_attribute("width")) > 50


def test_the_page_has_a_card_and_a_sign(sheet, address):
    sheet.goto(address + "chapters/amp.html")
    tags = {tag.get_attribute("property"): tag.get_attribute("content") for tag in
            sheet.locator("meta[property^='og:']").all()}
    assert tags["og:title"].startswith("AMP") and len(tags["og:description"]) > 40
    for link in (tags["og:image"], sheet.locator("link[rel*=icon]").first.get_attribute("href")):
        assert sheet.request.get(urljoin(sheet.url, link)).ok


# --- for everybody ----------------------------------------------------------------------------------------------------


def violations(page, rules):
    """Return serious violations of axe-core rules, with their first locations."""
    page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = page.evaluate("options => axe.run({exclude: [['mjx-container']]}, options)",
                          {"resultTypes": ["violations"], "preload": False, "rules": rules})["violations"]
    return {v["id"]: [node["html"][:120] for node in v["nodes"][:3]] for v in found
            if v["impact"] in SERIOUS and v["id"] not in THEMES_OWN}


def one_of_a_kind(names):
    """Return every page, but only the first page of each notebook."""
    made_from = {f"executed/{row.name}.html": row.notebook for row in runs.rows(Tree.at(ROOT)).values()}
    return list({made_from.get(name, name): name for name in reversed(names)}.values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_shuts_a_reader_out(browser, address, names, scheme):
    context = browser.new_context(viewport=LAPTOP, color_scheme=scheme)
    page, found = context.new_page(), {}
    for name in one_of_a_kind(names):
        page.goto(address + name, wait_until="load")
        found[name] = violations(page, {})
    context.close()
    assert not {name: broken for name, broken in found.items() if broken}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sheet", LOOKS, indirect=True, ids=["light", "light-phone", "dark", "dark-phone"])
def test_text_stands_out_by_day_and_by_night(sheet, address, name, request):
    sheet.goto(f"{address}{name}.html", wait_until="load")
    wanted = request.node.callspec.params["sheet"]["color_scheme"]
    assert sheet.locator("html").get_attribute("data-theme") == wanted
    assert not violations(sheet, {})


def test_the_browser_would_tell_of_a_missing_file(sheet, address):
    """Require a report for a missing file; otherwise the tests above could not fail."""
    sheet.set_content("<main><img src='x.png'><input></main>")
    assert {"image-alt", "label"} <= set(violations(sheet, {}))
    assert sheet.goto(address + "chapters/none.html").status == 404


def test_the_address_of_the_site_leads_to_the_first_chapter(sheet, address):
    sheet.goto(address)
    sheet.wait_for_url("**/chapters/intro.html")
