"""Promises to readers and teachers: goals, reading times, explained terms, verdicts from records."""

import ast
import importlib.util
import json
import math
import re

import pytest
import yaml
from test_book import BOOK, CHAPTERS, ROOT, glued, prose, read_page, stem
from test_exercises import exercises

from pruning_lib.report import slides

LOOKED_UP = {"api", "notation", "glossary", "adding", "references", "model_types", "runs"}  # looked up
FRONT = "intro"  # the front page tells findings and leads on
READ = [path for path in CHAPTERS if path.stem not in LOOKED_UP | {FRONT}]
FIRST_WORDS = (r"\A# .+\n\n\*You will learn\* .+ \*You need\* .+ "
               r"\*Time:\* (\d+) minutes to read(?:, (\d+) for the exercises)?\.\n")
WORDS_PER_MINUTE, LINES_PER_MINUTE, FORMULAS_PER_MINUTE = 200, 20, 2


def printed_lines(path):
    """Return the number of code lines of a chapter, including quoted code of the library."""
    own = re.findall(r"^```(?:python|yaml|text)\n(.*?)^```", path.read_text(), re.M | re.S)
    count = sum(len(block.splitlines()) for block in own)
    for file, name in re.findall(r"\{literalinclude\} (\S+)\n(?::\w+:.*\n)*?:pyobject: (\w+)", path.read_text()):
        tree = ast.parse((path.parent / file).resolve().read_text())
        node = next(node for node in tree.body if getattr(node, "name", "") == name)
        count += node.end_lineno - node.lineno + 1
    return count


def minutes(path):
    """Return the reading time of a chapter in minutes, without its exercises."""
    text = path.read_text()
    solutions = re.sub(r"^````\{admonition\} Solution.*?^````$", "", text, flags=re.M | re.S)
    read = re.sub(r"^```\{admonition\} Exercise.*?^```$", "", solutions, flags=re.M | re.S)
    lines = printed_lines(path) - sum(len(block.splitlines()) for block in re.findall(
        r"^```python\n(.*?)^```", "".join(re.findall(r"^````.*?^````$", text, re.M | re.S)), re.M | re.S))
    formulas = read.count("{math}") + len(re.findall(r"^\$\$$", read, re.M)) // 2
    words = re.sub(r"^(`{3,})(?:python|yaml|text|\{literalinclude).*?^\1", "", read, flags=re.M | re.S)
    words = re.sub(r"\{glue:text\}`[^`]+`", "number", words)
    return len(words.split()) / WORDS_PER_MINUTE + lines / LINES_PER_MINUTE + formulas / FORMULAS_PER_MINUTE


@pytest.mark.parametrize("path", READ, ids=stem)
def test_a_chapter_begins_with_goals_what_is_needed_and_honest_minutes(path):
    found = re.match(FIRST_WORDS, path.read_text())
    assert found, "wanted: *You will learn* ... *You need* ... *Time:* N minutes to read(, M for the exercises)."
    needed = minutes(path)
    assert abs(int(found[1]) - needed) <= max(1, 0.15 * needed), f"takes about {math.ceil(needed)} minutes to read"
    assert int(found[2] or 0) == sum(number for _, number in exercises(path.read_text()))


def terms():
    """Return every term of the glossary in lower case."""
    text = (BOOK / "chapters" / "glossary.md").read_text()
    lines = re.search(r"```\{glossary\}\n(.*?)^```", text, re.M | re.S)[1].splitlines()
    return [line for line in lines if line and not line.startswith(" ")]


def linked(path):
    return {(a or b).lower() for a, b in re.findall(r"\{term\}`(?:[^`<]*<([^>`]+)>|([^`<]+))`", path.read_text())}


def test_the_glossary_is_in_order_and_explains_every_word_that_leads_to_it():
    known = [term.lower() for term in terms()]
    assert known == sorted(set(known)) and len(known) > 35
    for path in CHAPTERS:
        assert linked(path) <= set(known), path.name


@pytest.mark.parametrize("name", ["amp", "consensus", "robustness", "your_model", "records"])
def test_chapters_lead_to_the_glossary_where_a_word_comes_first(name):
    text = (BOOK / "chapters" / f"{name}.md").read_text()
    assert len(linked(BOOK / "chapters" / f"{name}.md")) >= 4
    used = [term.lower() for term in re.findall(r"\{term\}`(?:[^`<]*<)?([^>`]+)", text)]
    assert len(used) == len(set(used)), "once per chapter is enough"


def verdicts():
    """Return claim -> verdict of the claims page, from the pages that computed it."""
    lines = re.findall(r"^\| ([^|]+) \| [^|]+ \| \{glue:text\}`\.\./executed/(\w+)\.ipynb::(\w+_verdict):s` \|$",
                       (BOOK / "chapters" / "claims.md").read_text(), re.M)
    return {claim: glued(read_page(page))[key].strip("'") for claim, page, key in lines}


def test_the_readme_has_every_claim_with_its_verdict():
    wanted = verdicts()
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "README.md").read_text(), re.M)
    shown = {claim: verdict for claim, verdict in lines if claim != "claim" and "---" not in claim}
    assert len(wanted) > 10
    assert shown == wanted, "README.md needs:\n" + "\n".join(f"| {c} | {v} |" for c, v in wanted.items())


def test_the_readme_tells_the_findings_of_the_front_page_and_has_its_four_doors():
    front, readme = (BOOK / "chapters" / f"{FRONT}.md").read_text(), (ROOT / "README.md").read_text()
    path = BOOK / "drawings" / "findings.py"
    spec = importlib.util.spec_from_file_location("findings", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.SECTION.search(readme)[2] == script.findings(), f"numbers have changed; run: python {path}"
    for name, about in re.findall(r"\{grid-item-card\} ([^\n]+)\n:link: \S+\n:link-type: doc\n(.+)\n", front):
        assert f"- **{name}.** {about}" in readme


# --- slides -----------------------------------------------------------------------------------------------------------


SLIDES = yaml.safe_load((BOOK / "slides.yml").read_text())


@pytest.mark.parametrize("entry", [e for e in SLIDES if "page" in e], ids=lambda e: f"{e['page']}: {e['heading']}")
def test_a_slide_names_a_heading_that_its_page_has(entry):
    """Check headings quickly; the builder reports them only after a minute."""
    assert set(entry) <= {"page", "heading", "title", "show", "ask", "text", "drawing", "notes"}
    path = next(p for p in (BOOK / f"{entry['page']}.md", ROOT / f"notebooks/{entry['page'][9:]}.ipynb") if p.is_file())
    assert entry["heading"] in re.findall(r"^#{1,3} (.+)$", prose(path), re.M)


PAGE = """<html><body><section id="amp"><h1>AMP<a class="headerlink" href="#amp">#</a></h1><p>First.</p>
<section id="idea"><h2>The idea<a class="headerlink" href="#idea">#</a></h2><p id="x">Look at
<a href="../executed/run.html#a">this</a> and <a href="#amp">that</a>.</p><img src="../_images/a.png" alt="A">
<details><summary><p>Show code</p></summary><div class="highlight"><button>Copy</button><pre>1 + 1</pre></div></details>
</section></section></body></html>"""


@pytest.fixture
def built(tmp_path):
    """Return a book of one page, and a function that builds slides from entries."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters" / "amp.html").write_text(PAGE)

    def build(*entries):
        (tmp_path / "slides.yml").write_text(yaml.safe_dump(list(entries)))
        return slides.build(tmp_path, tmp_path / "slides.yml").read_text()

    return build


def test_a_slide_shows_what_stands_below_its_heading_and_links_lead_where_they_led(built):
    html = built({"title": "Session <1>"}, {"page": "chapters/amp", "heading": "The idea", "ask": "Why?"})
    assert "Session &lt;1&gt;" in html and html.count("<section>") == 2 and "First." not in html
    assert 'href="chapters/../executed/run.html#a"' in html and 'src="chapters/../_images/a.png"' in html
    assert 'href="chapters/amp.html#amp"' in html and 'href="chapters/amp.html#idea"' in html
    assert "1 + 1" in html and "Copy" not in html and "Show code" not in html
    assert 'id="x"' not in html and 'alt="A"' in html and "Why?" in html


def test_slides_fetch_nothing(built):
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//|@import|url\(", built({"title": "Session"}))


def test_a_slide_has_text_with_formulas_and_numbers_of_pages_and_notes_for_the_speaker(built, tmp_path):
    out = {"data": {"text/plain": ["'55.0'"]}, "metadata": {"scrapbook": {"name": "ppl"}}}
    (tmp_path / "executed").mkdir()
    (tmp_path / "executed" / "run.ipynb").write_text(json.dumps({"cells": [{"outputs": [out]}]}))
    html = built({"title": "Least squares", "text": "**{run::ppl}** for $a<b$", "notes": "Wait."})
    assert "<strong>55.0</strong>" in html and r"\(a&lt;b\)" in html and "<h2>Least squares</h2>" in html
    assert '<aside class="notes"><p>Wait.</p>' in html
    with pytest.raises(SystemExit, match="page 'run' glues no 'x'"):
        built({"title": "Least squares", "text": "{run::x}"})
    with pytest.raises(SystemExit, match="no drawing 'none'"):
        built({"title": "Least squares", "drawing": "none"})


def test_every_slide_has_one_idea_and_notes():
    assert len(SLIDES) > 15
    for entry in SLIDES:
        assert entry["title"] and entry["notes"], entry
        assert len(re.sub(r"[|*{}:$\\-]", " ", entry.get("text", "")).split()) <= 70, f"too much on {entry['title']!r}"


@pytest.mark.parametrize(("entry", "message"), [
    ({"page": "chapters/no", "heading": "The idea"}, "no page 'chapters/no'"),
    ({"page": "chapters/amp", "heading": "The end"}, "no heading 'The end'"),
    ({"page": "chapters/amp", "heading": "The idea", "show": "table"}, "nothing on chapters/amp")])
def test_what_a_slide_asks_for_and_is_not_there_stops_the_build(built, entry, message):
    with pytest.raises(SystemExit, match=message):
        built(entry)


# --- the front page ---------------------------------------------------------------------------------------------------


def test_the_front_page_has_a_picture_three_findings_from_records_and_four_doors():
    text = (BOOK / "chapters" / f"{FRONT}.md").read_text()
    findings = re.findall(r"^\d\. \*\*.+$", re.search(r"## Three findings\n(.*?)\n## ", text, re.S)[1], re.M)
    assert len(findings) == 3 and all("{glue:text}" in line and "](" in line for line in findings)
    assert re.search(r"```\{figure\} \.\./_static/\w+\.png\n:alt: .{40}", text)
    doors = re.findall(r"\{grid-item-card\} ([^\n]+)\n:link: (\S+)\n:link-type: doc", text)
    assert [name for name, _ in doors] == ["Learn", "Prune a model", "Teach", "Check the claims"]
