"""Copy the findings of the front page with their numbers into the README: python book/drawings/findings.py"""

import json
import re
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1]
README = BOOK.parent / "README.md"
SECTION = re.compile(r"(## Three findings\n\n)(.*?)(\n\n## )", re.S)


def glued(page, key):
    """Return the text that a page has glued under a key."""
    for cell in json.loads((BOOK / "executed" / f"{page}.ipynb").read_text())["cells"]:
        for output in cell.get("outputs", []):
            if output.get("metadata", {}).get("scrapbook", {}).get("name") == key:
                return "".join(next(iter(output["data"].values()))).strip("'")
    raise SystemExit(f"page {page!r} glues no {key!r}")


def findings():
    """Return the findings of the front page without links and terms of the glossary."""
    text = SECTION.search((BOOK / "chapters" / "intro.md").read_text())[2]
    text = re.sub(r"\{glue:text\}`\.\./executed/(\w+)\.ipynb::(\w+):s`", lambda found: glued(*found.groups()), text)
    text = re.sub(r" Read \[[^\]]+\]\([^)]+\)\.", "", re.sub(r"\{term\}`([^`<]+)`", r"\1", text))
    return re.sub(r"(?<=\d)%", " %", re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text))


if __name__ == "__main__":
    README.write_text(SECTION.sub(lambda found: found[1] + findings() + found[3], README.read_text(), count=1))
