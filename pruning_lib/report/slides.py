"""Slides for a lecture: one idea each, with numbers of the records, speaker notes, and figures of the built book.

``book/slides.yml`` lists the slides.  A slide has a ``title`` and any of: ``text`` (Markdown with formulas, where
``{page::key}`` is a number glued by a page), ``drawing`` (a file of book/drawings), or ``page``, ``heading`` and
``show`` (a CSS selector of parts below that heading), ``ask`` (a question for the class), ``notes`` (for the speaker).
The result is one page of plain HTML, ``slides.html``, in the folder of the book's index.  It downloads nothing: styles
of code and formulas come from files of the built book.  Every slide is 1280 x 720 and scaled to the window; printing it
gives a PDF with a page for each slide:

    python -m pruning_lib.report.slides build/report/book/_build/html/slides.html slides.pdf
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra

with extra("report"):
    import yaml
    from bs4 import BeautifulSoup, Tag
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin


USUAL = "p, ul, ol, table, img, .math, .highlight"
STYLE = """
html { scroll-snap-type: y proximity; font: 28px/1.4 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { margin: 0; overflow-x: hidden; }
section { box-sizing: border-box; width: 1280px; height: 720px; padding: 40px 72px; scroll-snap-align: start;
          overflow: hidden; display: flex; flex-direction: column; justify-content: center; zoom: var(--scale, 1);
          border-bottom: 1px solid #ddd; position: relative; }
section > * { max-width: 100%; margin-block: 0 .5em; }
h1 { font-size: 2em; } h2 { font-size: 1.4em; color: #005083; }
img { max-height: 470px; max-width: 100%; object-fit: contain; align-self: center; height: auto; }
pre { font-size: .68em; line-height: 1.35; background: #f5f5f5; padding: .6em; margin: 0; white-space: pre-wrap; }
.eqno { display: none; } li { margin-bottom: .35em; }
table { border-collapse: collapse; font-size: .75em; } td, th { padding: .25em .9em .25em 0; text-align: left; }
.ask { border-left: .25em solid #0072b2; padding-left: .7em; font-weight: 600; }
footer, footer a { font-size: 16px; color: #595959; }
footer { position: absolute; bottom: 14px; left: 72px; margin: 0; }
.notes { display: none; font-size: 18px; padding: 1em 72px; background: #fff8e6; max-width: 1136px; }
body.speaker .notes { display: block; }
svg.concept { display: block; width: 100%; max-height: 400px; }
figure.method svg { max-width: 200px; } figure.method span { font-size: .62em; }
figure.method strong { font-size: .8em; }
@page { size: 1280px 720px; margin: 0; }
@media print { section { zoom: 1; break-after: page; border: 0; }
  body.speaker section { zoom: .7; break-after: avoid; } body.speaker .notes { break-after: page; } }
"""
KEYS = """
const fit = () => document.documentElement.style.setProperty("--scale",
  Math.min(document.documentElement.clientWidth / 1280, innerHeight / 720));
addEventListener("resize", fit); fit();
addEventListener("keydown", event => {
  if (event.key === "n") return document.body.classList.toggle("speaker");
  const step = {ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1}[event.key];
  if (!step || event.target.closest("a, summary")) return;
  const slides = [...document.querySelectorAll("section")], middle = innerHeight / 2;
  const now = slides.findIndex(s => s.getBoundingClientRect().bottom > middle);
  event.preventDefault();
  (slides[now + step] || slides[now]).scrollIntoView({behavior: "smooth"});
});
"""


def build(html: Path, contents: Path) -> Path:
    """Write ``html/slides.html`` from the pages under ``html`` as listed in ``contents`` and return its path.

    Raises
    ------
    SystemExit
        for a missing page, heading, part, drawing or number; the message names the slide.
    """
    pages: dict[str, BeautifulSoup] = {}
    slides = []
    for entry in yaml.safe_load(contents.read_text()):
        if "page" in entry and entry["page"] not in pages:
            path = html / f"{entry['page']}.html"
            if not path.is_file():
                raise SystemExit(f"slides.yml: no page {entry['page']!r} in the built book")
            pages[entry["page"]] = BeautifulSoup(path.read_text(), "html.parser")
        slides.append(_slide(pages.get(entry.get("page", "")), entry, contents.parent))
    out = html / "slides.html"
    out.write_text(f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Slides: structured pruning, re-run</title>
<link rel="icon" href="_static/favicon.png"><link rel="stylesheet" href="_static/pygments.css">
<link rel="stylesheet" href="_static/custom.css"><style>{STYLE}</style>
<script defer src="_static/mathjax/tex-chtml.js"></script>
<script>addEventListener("DOMContentLoaded", () => {{{KEYS}}})</script>
</head><body><main>
{chr(10).join(slides)}
</main></body></html>
""")
    return out


def pdf(slides: Path, out: Path) -> Path:
    """Print ``slides`` to the PDF file ``out`` with Chromium, a page for each slide.

    Raises
    ------
    SystemExit
        without Chromium; any browser's own print command does the same.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium here; open the slides in any browser and print them to PDF, without margins")
    subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
                    "--virtual-time-budget=10000", f"--print-to-pdf={out.resolve()}", slides.resolve().as_uri()],
                   check=True, capture_output=True)
    return out


def _slide(page: BeautifulSoup | None, entry: dict[str, Any], book: Path) -> str:
    """Return one slide: title, text, drawing, parts of a page, question, source, and notes."""
    first = list(entry) == ["title", *(key for key in ("ask", "notes") if key in entry)]
    tag, parts, source = "h1" if first else "h2", [], ""
    if "text" in entry:
        parts.append(_markdown(_with_numbers(entry["text"], book)))
    if "drawing" in entry:
        drawing = book / "drawings" / f"{entry['drawing']}.html"
        drawing = drawing if drawing.is_file() else drawing.with_suffix(".svg")
        if not drawing.is_file():
            raise SystemExit(f"slides.yml: no drawing {entry['drawing']!r} in {drawing.parent}")
        parts.append(drawing.read_text())
    if page is not None:
        found, source = _excerpt(page, entry)
        parts.append(found)
    notes = f'<aside class="notes">{_markdown(_with_numbers(entry["notes"], book))}</aside>' if "notes" in entry else ""
    title = entry.get("title", entry.get("heading", ""))
    return f"<section><{tag}>{escape(title)}</{tag}>{''.join(parts)}{_ask(entry)}{source}</section>{notes}"


def _markdown(text: str) -> str:
    """Return Markdown with formulas as HTML that MathJax reads."""
    def formula(content: str, options: dict[str, Any]) -> str:
        return (r"\[{}\]" if options.get("display_mode") else r"\({}\)").format(escape(content))

    return MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=formula).render(text)


def _with_numbers(text: str, book: Path) -> str:
    """Return the text with ``{page::key}`` replaced by the value that the executed page has glued."""
    def value(found: re.Match[str]) -> str:
        path = book / "executed" / f"{found[1]}.ipynb"
        cells = json.loads(path.read_text())["cells"] if path.is_file() else []
        for output in (out for cell in cells for out in cell.get("outputs", [])):
            if output.get("metadata", {}).get("scrapbook", {}).get("name") == found[2]:
                return "".join(next(iter(output["data"].values()))).strip("'")
        raise SystemExit(f"slides.yml: page {found[1]!r} glues no {found[2]!r}")

    return re.sub(r"\{(\w+)::(\w+)\}", value, text)


def _excerpt(page: BeautifulSoup, entry: dict[str, Any]) -> tuple[str, str]:
    """Return the parts of a page below a heading, and a footer that links to it."""
    headings = page.select("section > h1, section > h2, section > h3")
    heading = next((h for h in headings if _words(h) == entry["heading"]), None)
    if heading is None or heading.parent is None:
        raise SystemExit(f"slides.yml: {entry['page']} has no heading {entry['heading']!r}")
    below = heading.parent
    for button in below.select("summary"):  # labels of folded code
        button.decompose()
    found = [part for part in below.select(entry.get("show", USUAL)) if part.find_parent("section") is below]
    found = [part for part in found if not any(other in part.parents for other in found)]
    if not found:
        raise SystemExit(f"slides.yml: nothing on {entry['page']} under {entry['heading']!r} is {entry.get('show')!r}")
    folder = entry["page"].rpartition("/")[0]
    where = f"{entry['page']}.html#{below.get('id', '')}"
    return ("".join(_standing(part, folder, entry["page"]) for part in found),
            f"<footer>From <a href=\"{where}\">{escape(entry['heading'])}</a></footer>")


def _standing(part: Tag, folder: str, page: str) -> str:
    """Return a part of a page as HTML, with links adjusted to the location of the slides."""
    for tag in [part, *part.find_all(True)]:
        if tag.name in ("table", "pre"):  # scrollable, so reachable by keyboard
            tag["tabindex"] = "0"
        for name in ("src", "href"):
            value = tag.get(name)
            if isinstance(value, str) and "://" not in value and not value.startswith(("data:", "/")):
                tag[name] = f"{page}.html{value}" if value.startswith("#") else f"{folder}/{value}" if folder else value
        tag.attrs.pop("id", None)  # ids stay unique to the page
    for button in part.select("button, .headerlink, style"):
        button.decompose()
    return f'<div class="wide">{part}</div>' if part.name == "table" else str(part)


def _ask(entry: dict[str, Any]) -> str:
    return f'<p class="ask">{escape(entry["ask"])}</p>' if "ask" in entry else ""


def _words(heading: Tag) -> str:
    """Return the text of a heading without its permalink mark."""
    return "".join(heading.find_all(string=True, recursive=False)).strip() or heading.get_text().rstrip("#").strip()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("give two files: slides.html and the PDF to write")
    print(pdf(Path(sys.argv[1]), Path(sys.argv[2])))
