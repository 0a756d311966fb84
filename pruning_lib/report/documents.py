"""The chapters as one PDF or one EPUB, from the pages of the built book, in the order of its contents.

Both contain chapters and readings, without pages of runs, the list of runs and the reference of the library, which are
for the screen.  Folded parts are open, folded code is left out, and a widget is the finished figure that its page has
without a script.  Formulas are typeset by MathJax of the site in Chromium: as type in the PDF, as MathML in the EPUB.
Order of this file: chapters · cleaning · PDF · formulas · EPUB.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

from pruning_lib import _files
from pruning_lib._extras import extra

with extra("report"):
    import lxml.etree
    import lxml.html
    import yaml
    from bs4 import BeautifulSoup, Tag

LEFT_OUT = {"chapters/runs", "chapters/api"}
SCREEN_ONLY = ("script, style, button, input, select, textarea, .headerlink, .run-it, .run-of, .controls, .bars, "
               ".scroll-hint, .tableofcontents-wrapper, details.hide.above-input, .copybtn, .live-bar")
TITLE = "Structured pruning, re-run"
MIME = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".gif": "image/gif"}
STYLE = """
:root { --pst-color-text-base: #1a1a1a; --pst-color-text-muted: #48566b; --pst-color-border: #c9c9c9;
  --pst-color-background: #fff; --pst-color-surface: #f3f4f5; --pst-color-primary: #005083; }
body { font: 10.5pt/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; margin: 0; }
h1 { font-size: 1.9em; line-height: 1.2; } h2 { font-size: 1.4em; margin-top: 1.6em; } h3 { font-size: 1.15em; }
h1, h2, h3 { color: #00405f; break-after: avoid; }
img, svg { max-width: 100%; height: auto; } img { max-height: 23cm; }
figure { margin: 1em 0; break-inside: avoid; } figcaption { font-size: .9em; color: #48566b; }
figcaption p { margin: 0; } .caption-number { font-style: italic; }
pre { font: 8pt/1.4 "DejaVu Sans Mono", monospace; background: #f5f5f5; padding: .6em; white-space: pre-wrap;
  overflow-wrap: anywhere; break-inside: avoid-page; }
code { font-family: "DejaVu Sans Mono", monospace; font-size: .86em; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .82em; width: 100%; margin: .6em 0; } tr { break-inside: avoid; }
th, td { border-bottom: 1px solid #ccc; padding: .2em .6em .2em 0; text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
td code, th code { overflow-wrap: break-word; } td p, th p { margin: 0; }
.admonition, details { border-left: 3px solid #0072b2; padding: .1em .9em; margin: 1em 0; background: #f7f9fb; }
.admonition-title, summary { font-weight: bold; } summary { list-style: none; }
a { color: #005083; text-decoration: none; }
.widget .share span { display: block; height: .7em; background: #0072b2; }
.sd-card { border: 1px solid #ccc; padding: .3em .8em; margin: .5em 0; }
.formula mjx-container { font-size: 112% !important; } dt { font-weight: bold; } .eqno { float: right; }
"""
PAPER = """
@page { size: A4; margin: 20mm 18mm 20mm 18mm; @bottom-center { content: counter(page); font: 9pt sans-serif; } }
@page :first { @bottom-center { content: ""; } }
article, nav { break-before: page; }
header { height: 230mm; display: flex; flex-direction: column; justify-content: center; }
header h1 { font-size: 30pt; } nav li { margin: .15em 0; }
"""


@dataclass
class Chapter:
    """One page of the book: its name in the contents, its title, and its content."""

    name: str
    title: str
    part: str
    body: Tag


def chapters(html: Path, contents: Path) -> list[Chapter]:
    """Return the chapters of a built book in the order of its ``_toc.yml``, cleaned for paper."""
    toc = yaml.safe_load(contents.read_text())
    named = [(toc["root"], ""), *((entry["file"], part["caption"]) for part in toc.get("parts", [])
                                  for entry in part["chapters"])]
    return [_chapter(html, name, part) for name, part in named
            if name not in LEFT_OUT and (html / f"{name}.html").is_file()]


def _chapter(html: Path, name: str, part: str) -> Chapter:
    soup = BeautifulSoup((html / f"{name}.html").read_text(), "html.parser")
    body = soup.select_one("article.bd-article")
    if body is None or body.h1 is None:
        raise SystemExit(f"{html / name}.html is not a page of this book; build the book again")
    for useless in body.select(SCREEN_ONLY):
        useless.decompose()
    for part_of_page in body.find_all(True):
        _clean(part_of_page, name)
    body.attrs = {"id": anchor(name)}
    return Chapter(name, body.h1.get_text().strip(), part, body)


# --- cleaning ---------------------------------------------------------------------------------------------------------


def anchor(name: str, place: str = "") -> str:
    """Return the id of a page, or of a place on it, in one document of all pages."""
    return re.sub(r"[^\w-]", "-", name) + (f"--{place}" if place else "")


def _clean(tag: Tag, name: str) -> None:
    """Make the id of a tag unique in the document, and its links relative to the document."""
    for key in list(tag.attrs):
        if key.startswith(("data-", "on")) or key in ("tabindex", "role", "aria-live"):
            del tag.attrs[key]
    if tag.name == "details":
        tag["open"] = "open"
    if tag.get("id"):
        tag["id"] = anchor(name, str(tag["id"]))
    if tag.name == "img" and isinstance(tag.get("src"), str) and not str(tag["src"]).startswith("data:"):
        tag["src"] = _resolved(name, str(tag["src"]))
    if tag.name == "a" and isinstance(tag.get("href"), str):
        tag["href"] = _target(name, str(tag["href"]))


def _resolved(name: str, link: str) -> str:
    """Return a link of a page as a path from the folder of the book."""
    parts: list[str] = []
    for part in (PurePosixPath(name).parent / link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def _target(name: str, link: str) -> str:
    if "://" in link or link.startswith("mailto:"):
        return link
    path, _, place = link.partition("#")
    page = _resolved(name, path).removesuffix(".html") if path else name
    return f"#{anchor(page, place)}"


def _without_dead_links(found: list[Chapter]) -> None:
    """Turn links to pages that are not in the document into plain text."""
    ids = {str(tag["id"]) for chapter in found for tag in [chapter.body, *chapter.body.find_all(id=True)]}
    for chapter in found:
        for link in chapter.body.find_all("a", href=True):
            target = str(link["href"])
            if target.startswith("#") and target[1:] not in ids:
                page = target[1:].partition("--")[0]
                if page in ids:
                    link["href"] = f"#{page}"
                else:
                    link.unwrap()


def _prepared(html: Path, contents: Path, convert: str) -> tuple[list[Chapter], str]:
    """Return the chapters with links inside the document and formulas typeset, and the style of the formulas.

    Parameters
    ----------
    convert : as in ``_typeset``
    """
    found = chapters(html, contents)
    _without_dead_links(found)
    return found, _typeset(html, found, convert)


# --- PDF --------------------------------------------------------------------------------------------------------------


def pdf(html: Path, contents: Path, out: Path) -> Path:
    """Print the chapters of a built book to the PDF file ``out``, with a table of contents and an outline.

    Raises
    ------
    SystemExit
        without Chromium.
    """
    found, formulas = _prepared(html, contents, "tex2chtml")
    page = html / "print.html"  # beside the figures and fonts that it uses
    page.write_text(f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>
<link rel="stylesheet" href="_static/pygments.css"><link rel="stylesheet" href="_static/custom.css">
<style>{STYLE}{PAPER}</style><style>{formulas}</style></head><body>
<header><h1>{TITLE}</h1><p>AMP for language models and Consensus for image networks, explained and re-run.</p></header>
<nav>{_contents(found)}</nav>{"".join(str(chapter.body) for chapter in found)}</body></html>""")
    try:
        with _files.replacing(out.resolve()) as beside:
            _chromium("--no-pdf-header-footer", "--generate-pdf-document-outline", "--virtual-time-budget=240000",
                      f"--print-to-pdf={beside}", page.resolve().as_uri())
    finally:
        page.unlink()
    return out


def _contents(found: list[Chapter]) -> str:
    """Return the table of contents as nested lists of links."""
    text, part = "<h1>Contents</h1><ul>", ""
    for chapter in found:
        if chapter.part != part:
            text, part = f"{text}</ul><h3>{escape(chapter.part)}</h3><ul>", chapter.part
        text += f'<li><a href="#{anchor(chapter.name)}">{escape(chapter.title)}</a></li>'
    return text + "</ul>"


def _chromium(*arguments: str) -> str:
    """Run Chromium without a window and return its output."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium here, which typesets the formulas; on Debian: "
                         "apt-get install --no-install-recommends chromium")
    return subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                           *arguments], check=True, capture_output=True, text=True).stdout


# --- formulas ---------------------------------------------------------------------------------------------------------


def _formulas(found: list[Chapter]) -> list[tuple[Tag, str, bool]]:
    """Return the tags that hold a formula, their TeX, and whether they stand alone on a line."""
    tags = [tag for chapter in found for tag in chapter.body.select("span.math, div.math")]
    return [(tag, re.sub(r"^\\[(\[]|\\[)\]]$", "", _tex(tag)), tag.name == "div") for tag in tags]


def _tex(tag: Tag) -> str:
    numbers = "".join(number.get_text() for number in tag.select(".eqno"))
    return tag.get_text().strip().removeprefix(numbers).strip()


def _typeset(html: Path, found: list[Chapter], convert: str) -> str:
    """Replace every formula by the result of a function of the site's own MathJax, and return the style it needs.

    Parameters
    ----------
    convert : ``tex2mml`` for MathML, ``tex2chtml`` for type
    """
    formulas = _formulas(found)
    page = html / "formulas.html"
    data = json.dumps([[tex, display] for _, tex, display in formulas]).replace("</", "<\\/")
    page.write_text(f"""<!DOCTYPE html><meta charset="utf-8"><script src="_static/mathjax/tex-chtml.js"></script>
<pre id="out"></pre><script>window.addEventListener("load", () => MathJax.startup.promise.then(() => {{
  const made = {data}.map(([tex, display]) => MathJax.{convert}(tex, {{ display }}));
  MathJax.chtmlStylesheet();  // adds the characters in use to its rules
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).map((rule) => rule.cssText);
  document.getElementById("out").textContent = JSON.stringify({{ made: made.map((one) => one.outerHTML || one),
    style: rules.join(" ") }}); }}));</script>""")
    try:
        dom = _chromium("--virtual-time-budget=60000", "--dump-dom", page.resolve().as_uri())
    finally:
        page.unlink()
    output = BeautifulSoup(dom, "html.parser").select_one("#out")
    if output is None or not output.get_text():
        raise SystemExit("Chromium did not convert the formulas; is _static/mathjax of the built book complete?")
    answer = json.loads(output.get_text())
    for (tag, _, display), made in zip(formulas, answer["made"], strict=True):
        numbers = "".join(str(number) for number in tag.select(".eqno"))
        kind = "div" if display else "span"
        tag.replace_with(BeautifulSoup(f'<{kind} class="formula">{numbers}{made}</{kind}>', "html.parser"))
    return str(answer["style"])


# --- EPUB -------------------------------------------------------------------------------------------------------------


def epub(html: Path, contents: Path, out: Path) -> Path:
    """Write the chapters of a built book to the EPUB 3 file ``out``, one file for each chapter.

    Raises
    ------
    SystemExit
        without Chromium.
    """
    found, _ = _prepared(html, contents, "tex2mml")
    home = {str(tag["id"]): anchor(chapter.name) for chapter in found
            for tag in [chapter.body, *chapter.body.find_all(id=True)]}
    images = sorted({str(img["src"]) for chapter in found for img in chapter.body.find_all("img")
                     if not str(img["src"]).startswith("data:")})
    with _files.replacing(out) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("style.css", STYLE)
        for number, path in enumerate(images):
            book.write(html / path, _image_name(number, path))
        for chapter in found:
            book.writestr(f"{anchor(chapter.name)}.xhtml", _xhtml(chapter, home, images))
        book.writestr("nav.xhtml", NAV.format(contents=re.sub(r'href="#([\w-]+)"', r'href="\1.xhtml"',
                                                              _contents(found).replace("h1", "h2"))))
        book.writestr("book.opf", _package(found, images))
    return out


CONTAINER = """<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
XHTML = """<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops" lang="en"><head>
<title>{title}</title><link rel="stylesheet" href="style.css"/></head><body>{body}</body></html>"""
NAV = XHTML.format(title="Contents", body='<nav epub:type="toc">{contents}</nav>')


def _image_name(number: int, path: str) -> str:
    return f"images/{number}{PurePosixPath(path).suffix}"


def _xhtml(chapter: Chapter, home: dict[str, str], images: list[str]) -> str:
    """Return a chapter as XML, with links to the files of the EPUB."""
    for img in chapter.body.find_all("img"):
        if str(img["src"]) in images:
            img["src"] = _image_name(images.index(str(img["src"])), str(img["src"]))
    for link in chapter.body.find_all("a", href=re.compile("^#")):
        target = str(link["href"])[1:]
        link["href"] = f"{home[target]}.xhtml#{target}"
    return XHTML.format(title=escape(chapter.title), body=_xml(chapter.body))


def _xml(body: Tag) -> str:
    """Return HTML as well-formed XML: lower-case attributes of SVG get back the case that XML wants."""
    tree: Any = lxml.html.fromstring(str(body))
    text: str = lxml.etree.tostring(tree, encoding="unicode", method="xml")
    for name in ("viewBox", "preserveAspectRatio", "patternUnits", "patternTransform"):
        text = re.sub(rf"\b{name.lower()}=", f"{name}=", text)
    return re.sub(r"<svg(?![^>]*xmlns)", '<svg xmlns="http://www.w3.org/2000/svg"', text)


def _package(found: list[Chapter], images: list[str]) -> str:
    """Return the list of all files of the EPUB, and their order."""
    names = [anchor(chapter.name) for chapter in found]
    items = "".join(f'<item id="{name}" href="{name}.xhtml" media-type="application/xhtml+xml" '
                    'properties="mathml svg"/>' for name in names)
    items += "".join(f'<item id="image{number}" href="{_image_name(number, path)}" '
                     f'media-type="{MIME[PurePosixPath(path).suffix]}"/>' for number, path in enumerate(images))
    order = "".join(f'<itemref idref="{name}"/>' for name in names)
    return f"""<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id" xml:lang="en">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:identifier id="id">urn:pruning-lib:book</dc:identifier>
<dc:title>{TITLE}</dc:title><dc:language>en</dc:language><dc:creator>The pruning_lib authors</dc:creator>
<meta property="dcterms:modified">2026-01-01T00:00:00Z</meta></metadata>
<manifest><item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="style" href="style.css" media-type="text/css"/>{items}</manifest><spine>{order}</spine></package>"""
