"""The chapters as PDF and EPUB: whole, in order, with formulas and links that work."""

import re
import shutil
import zipfile
from importlib.metadata import files
from pathlib import Path

import pytest
from lxml import etree
from PIL import Image

from pruning_lib.report import documents

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to typeset formulas; on Debian: "
                                                             "apt-get install --no-install-recommends chromium")
FIRST = r"""<section id="heads"><h1>Heads<a class="headerlink" href="#heads">#</a></h1>
<p>See <a href="b.html#score">the score</a>, <a href="../executed/run-1.html">a run</a>, <a href="c.html">an API</a> and
<a href="https://example.org/x">elsewhere</a>. The norm
<span class="math notranslate nohighlight">\(\lVert x_h \rVert_1\)</span>.</p>
<div class="controls"><input type="range"></div>
<details><summary>Solution</summary><p>Folded.</p></details>
<details class="hide above-input"><summary>Show code</summary><pre>secret = 1</pre></details>
<figure><img src="../_images/a.png" alt="A"><br></figure>
<svg viewBox="0 0 1 1"><path d="M0 0"/></svg></section>"""
SECOND = r"""<section id="score"><h1>Score</h1><div class="math notranslate nohighlight" id="equation-s"><span
class="eqno">(1)<a class="headerlink" href="#equation-s">#</a></span>\[s = \frac{1}{N}\sum_n a_n\]</div></section>"""
PAGE = '<!DOCTYPE html><html><body><article class="bd-article">{}</article></body></html>'


@pytest.fixture
def site(tmp_path):
    """Return the folder of a site of three pages with the MathJax of the book, and its contents."""
    html = tmp_path / "html"
    for name, body in (("a", FIRST), ("b", SECOND), ("c", "<h1>Unlisted</h1>")):
        (html / "chapters").mkdir(parents=True, exist_ok=True)
        (html / "chapters" / f"{name}.html").write_text(PAGE.format(body))
    (html / "_images").mkdir()
    Image.new("RGB", (4, 4)).save(html / "_images" / "a.png")
    found = next(Path(path.locate()) for path in files("sphinx-mathjax-offline") if path.name == "tex-chtml.js")
    shutil.copytree(found.parent, html / "_static" / "mathjax")
    (tmp_path / "_toc.yml").write_text("root: chapters/a\nparts:\n- caption: More\n  chapters: [{file: chapters/b}]\n")
    return html, tmp_path / "_toc.yml"


def test_chapters_come_in_the_order_of_the_contents_without_what_needs_a_screen(site):
    first, second = documents.chapters(*site)
    assert [(c.name, c.title, c.part) for c in (first, second)] == [
        ("chapters/a", "Heads", ""), ("chapters/b", "Score", "More")]
    text = str(first.body)
    assert "Folded." in text and 'open="open"' in text
    assert not {word for word in ("secret", "range", "headerlink") if word in text}


@needs_chromium
def test_an_epub_is_well_formed_and_every_link_and_file_is_there(site, tmp_path):
    out = documents.epub(*site, tmp_path / "book.epub")
    with zipfile.ZipFile(out) as book:
        names = book.namelist()
        assert names[0] == "mimetype" and book.read("mimetype") == b"application/epub+zip"
        assert book.getinfo("mimetype").compress_type == zipfile.ZIP_STORED
        trees = {name: etree.fromstring(book.read(name)) for name in names if name.endswith((".xhtml", ".opf", ".xml"))}
    listed = {item.get("href") for item in trees["book.opf"].iter("{*}item")}
    assert listed == set(names) - {"mimetype", "META-INF/container.xml", "book.opf"}
    for name, tree in trees.items():
        for tag in tree.iter("{*}a", "{*}img"):
            file, _, place = (tag.get("href") or tag.get("src")).partition("#")
            if "://" not in file:
                assert file in names, (name, file)
                assert not place or place in {one.get("id") for one in trees[file].iter()}
    page = etree.tostring(trees["chapters-a.xhtml"], encoding="unicode")
    assert page.count("<math") == 1 and "merror" not in page and "viewBox=" in page
    assert "a run" in page and "run-1" not in page, "a link to a page that is not in the book is plain text"
    assert "(1)" in etree.tostring(trees["chapters-b.xhtml"], encoding="unicode")


@needs_chromium
def test_a_pdf_has_every_chapter_with_typeset_formulas_and_an_outline(site, tmp_path):
    out = documents.pdf(*site, tmp_path / "book.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", out)) == 4  # title, contents, two chapters
    assert {b"MathJax_Main-Regular", b"MathJax_Math-Italic"} <= set(re.findall(rb"/FontName /\w+\+([\w-]+)", out))
    assert b"/Outlines" in out and re.search(rb"/MediaBox \[0 0 59[45]", out)
    assert not list(site[0].glob("*.html")), "pages of its own making are gone"


def test_without_chromium_the_error_names_it(site, tmp_path, monkeypatch):
    monkeypatch.setattr(documents.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="apt-get install"):
        documents.pdf(*site, tmp_path / "book.pdf")
    assert not (tmp_path / "book.pdf").exists() and not list(site[0].glob("*.html"))


def test_a_page_that_is_not_of_the_book_is_named(site):
    (site[0] / "chapters" / "b.html").write_text("<html></html>")
    with pytest.raises(SystemExit, match="chapters/b"):
        documents.chapters(*site)
