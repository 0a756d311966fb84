"""One format of numbers on every page: a space before the per cent sign that keeps both together, and a minus sign.

Values come from prose, glued numbers and tables that pandas writes; code, formulas and links stay as they are.
"""

import re

from docutils import nodes

NOT_PROSE = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw, nodes.comment)
PERCENT, MINUS = re.compile(r"(?<=\d)[ \u202f]?%(?!\w)"), re.compile(r"(?<![\w.,:/)\u2212-])-(?=\d)")
SPACE = "\u00a0"


def formatted(text):
    """Return a text with its numbers in the format of the book."""
    return MINUS.sub("\u2212", PERCENT.sub(f"{SPACE}%", text))


def table(html):
    """Return a table in HTML with formatted numbers; its style sheet and its tags are unchanged."""
    head, found, rest = html.partition("<table")
    return head + re.sub(r">[^<>]+<", lambda part: formatted(part[0]), found + rest)


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
