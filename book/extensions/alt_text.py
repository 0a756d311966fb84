"""Alternative text of figures, taken from the prose of the page.

Cells of runs have no such text, because a change of a cell would make all pages of its notebook stale.  The prose
before a cell explains its figure, so heading and first sentence of that prose describe the figure.
"""

import re

from docutils import nodes

LONGEST = 240


def first_sentence(text):
    """Return the first informative sentence, without introductory words."""
    text = re.sub(r"^(How to read it|What it shows)\.\s*", "", " ".join(text.split()))
    sentence = re.match(r".+?[.:?](?=\s|$)", text)
    return (sentence.group() if sentence else text)[:LONGEST]


def caption_of(image):
    """Return the caption, without its number, of the figure that an image or the output around it belongs to."""
    while image.parent and not isinstance(image, nodes.figure):
        image = image.parent
    caption = image.next_node(nodes.caption) if isinstance(image, nodes.figure) else None
    numbers = [node for node in caption.findall(nodes.inline) if "caption-number" in node["classes"]] if caption else []
    return caption.astext().removeprefix("".join(node.astext() for node in numbers)) if caption else ""


def describe(app, doctree, docname):
    heading = prose = ""
    used = {}
    for node in doctree.findall():
        if isinstance(node, nodes.title):
            heading, prose = node.astext(), ""
        elif isinstance(node, nodes.paragraph) and not _in_output(node):
            prose = first_sentence(node.astext())
        elif isinstance(node, nodes.image) and not node.get("alt"):
            said = first_sentence(caption_of(node)) or prose
            text = f"Figure, {heading}: {said}" if said else f"Figure: {heading}"
            used[text] = used.get(text, 0) + 1
            node["alt"] = text if used[text] == 1 else f"{text} ({used[text]})"


def _in_output(node):
    while node := node.parent:
        if "cell_output" in node.get("classes", []):
            return True
    return False


def setup(app):
    app.connect("doctree-resolved", describe, priority=900)  # after pages that quote a figure contain it
    return {"parallel_read_safe": True, "parallel_write_safe": True}
