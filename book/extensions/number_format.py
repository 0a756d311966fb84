"""One format of numbers on every page: a space before the per cent sign that keeps both together, and a minus sign.

Values come from prose, from glued numbers and from tables that pandas writes; code, formulas and links stay as they are.
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
    for node in list(doctree.findall(nodes.Text)):
        if not any(isinstance(above, NOT_PROSE) for above in _above(node)):
            text = formatted(str(node))
            if text != str(node):
                node.parent.replace(node, nodes.Text(text))
    for node in doctree.findall(nodes.raw):
        if "html" in node.get("format", "") and ("dataframe" in node.astext() or 'id="T_' in node.astext()):
            node.children = [nodes.Text(table(node.astext()))]
            node.rawsource = node.astext()


def _above(node):
    while node := node.parent:
        yield node


def setup(app):
    app.connect("doctree-resolved", apply, priority=950)  # after numbers of other pages are in place
    return {"parallel_read_safe": True, "parallel_write_safe": True}
