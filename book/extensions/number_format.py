"""One format of numbers on every page: a space before the per cent sign that keeps both together, and a minus sign.

Values come from prose, glued numbers and tables that pandas writes; code, formulas and links stay as they are. In these
tables, thousands are separated and the names of columns are words.
"""

import re

from docutils import nodes

NOT_PROSE = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw, nodes.comment)
PERCENT, MINUS = re.compile(r"(?<=\d)[ \u202f]?%(?!\w)"), re.compile(r"(?<![\w.,:/)\u2212-])-(?=\d)")
LARGE = re.compile(r"(?<=>)-?\d{4,}(?=(?:\.\d+)?</td>)")
HEADING = re.compile(r"(?<=>)[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+(?=</th>)")
UNITS = re.compile(r"(?<!_per)_(s|W|J|bytes)$", re.IGNORECASE)
SPACE = "\u00a0"


def formatted(text):
    """Return a text with its numbers in the format of the book."""
    return MINUS.sub("\u2212", PERCENT.sub(f"{SPACE}%", text))


def table(html):
    """Return a table in HTML with formatted numbers; its style sheet and its tags are unchanged."""
    head, found, rest = html.partition("<table")
    names, end, body = rest.partition("</thead>")
    names = HEADING.sub(lambda name: words(name[0]), names) if end else names
    body = LARGE.sub(lambda number: f"{int(number[0]):,}", body)
    return head + re.sub(r">[^<>]+<", lambda part: formatted(part[0]), found + names + end + body)


def words(name):
    """Return the name of a column in words: ``idle_w`` is "idle, W"."""
    return UNITS.sub(lambda unit: ", " + {"w": "W", "j": "J"}.get(unit[1], unit[1]), name).replace("_", " ")


def apply(app, doctree, docname):
    for place, child in enumerate(doctree.children):
        if isinstance(child, nodes.Text):
            doctree.children[place] = _text(formatted(str(child)), doctree)
        elif isinstance(child, nodes.raw) and ("dataframe" in child.astext() or 'id="T_' in child.astext()):
            child.children = [_text(table(child.astext()), child)]
        elif not isinstance(child, NOT_PROSE):
            apply(app, child, docname)


def _text(text, parent):
    node = nodes.Text(text)
    node.parent = parent
    return node


def setup(app):
    app.connect("doctree-resolved", apply, priority=950)  # after numbers of other pages are in place
    return {"parallel_read_safe": True, "parallel_write_safe": True}
