"""Slides for a lecture, assembled from the pages of the built book, numbers and figures included.

``book/slides.yml`` lists for every slide a page, a heading on it, and a CSS selector for the parts below the heading.
The result is one page of plain HTML, ``slides.html``, in the folder of the book's index.  It downloads nothing: styles
of code and formulas come from files of the built book.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra

with extra("report"):
    import yaml
    from bs4 import BeautifulSoup, Tag


USUAL = "p, ul, ol, table, img, .math, .highlight"
STYLE = """
html { scroll-snap-type: y proximity; font: 22px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { margin: 0; }
section { box-sizing: border-box; min-height: 100vh; padding: 6vh 8vw; scroll-snap-align: start; display: flex;
          flex-direction: column; justify-content: center; border-bottom: 1px solid #ddd; }
section > * { max-width: 100%; }
h1 { font-size: 2.2em; margin: 0 0 .4em; } h2 { font-size: 1.5em; margin: 0 0 .6em; }
img { max-height: 62vh; max-width: 100%; object-fit: contain; align-self: flex-start; height: auto; }
pre { font-size: .72em; line-height: 1.35; background: #f5f5f5; padding: .7em; margin: 0 0 .6em; }
pre, .wide, div.math { overflow-x: auto; } .eqno { display: none; }
table { border-collapse: collapse; font-size: .8em; } td, th { padding: .25em .9em .25em 0; text-align: left; }
.ask { border-left: .25em solid #0072b2; padding-left: .7em; font-weight: 600; }
footer, footer a { font-size: 14px; color: #595959; } footer { margin-top: 1.2em; }
@media (max-width: 700px) { html { font-size: 17px; } section { padding: 5vh 5vw; } }
@media print { section { min-height: 0; height: 100vh; break-after: page; border: 0; } }
"""
KEYS = """
addEventListener("keydown", event => {
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
        for a missing page, heading or part; the message names the slide.
    """
    pages: dict[str, BeautifulSoup] = {}
    slides = []
    for entry in yaml.safe_load(contents.read_text()):
        if "page" not in entry:
            slides.append(f"<section><h1>{escape(entry['title'])}</h1>{_ask(entry)}</section>")
            continue
        path = html / f"{entry['page']}.html"
        if not path.is_file():
            raise SystemExit(f"slides.yml: no page {entry['page']!r} in the built book")
        if entry["page"] not in pages:
            pages[entry["page"]] = BeautifulSoup(path.read_text(), "html.parser")
        slides.append(_slide(pages[entry["page"]], entry))
    out = html / "slides.html"
    out.write_text(f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Slides: structured pruning, re-run</title>
<link rel="icon" href="_static/favicon.png"><link rel="stylesheet" href="_static/pygments.css"><style>{STYLE}</style>
<script defer src="_static/mathjax/tex-chtml.js"></script><script>{KEYS}</script></head><body><main>
{chr(10).join(slides)}
</main></body></html>
""")
    return out


def _slide(page: BeautifulSoup, entry: dict[str, Any]) -> str:
    """Return one slide from the section of a page under a heading."""
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
    return (f"<section><h2>{escape(entry.get('title', entry['heading']))}</h2>"
            f"{''.join(_standing(part, folder, entry['page']) for part in found)}{_ask(entry)}"
            f"<footer>From <a href=\"{where}\">{escape(entry['heading'])}</a></footer></section>")


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
