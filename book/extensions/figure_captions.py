"""Captions of figures that notebooks draw, and plain words for results that are missing.

A paragraph that begins with ``**Figure.**`` becomes the caption of the figure that the next code cell draws, with a
number.  A notebook thus reads well by itself, and no code cell carries a caption, because a change
of a cell would make all pages of its notebook stale.  Pages of runs are in no table of contents, so their figures are
counted on each page.
"""

import re

from docutils import nodes
from run_pages import titles
from sphinx.transforms import SphinxTransform

MARK = "Figure."


def is_caption(paragraph):
    """Return True for a paragraph that begins with the bold word; drop the empty text that may stand before it."""
    while paragraph.children and isinstance(paragraph[0], nodes.Text) and not paragraph[0].astext().strip():
        paragraph.pop(0)
    return bool(paragraph.children) and isinstance(paragraph[0], nodes.strong) and paragraph[0].astext() == MARK


def outermost(image, output):
    """Return the part of a cell's output that holds an image."""
    while image.parent is not output:
        image = image.parent
    return image


def following_cell(paragraph):
    """Return the first code cell after a paragraph of the same section, or None."""
    after = paragraph.parent.children[paragraph.parent.index(paragraph) + 1:]
    return next((node for node in after if "cell" in node.get("classes", [])), None)


def drawn(cell):
    """Return the last output of a cell that holds an image, and None if there is none."""
    parts = cell.findall(nodes.container) if cell else []
    outputs = [part for part in parts if "cell_output" in part.get("classes", [])]
    images = [outermost(image, output) for output in outputs for image in output.findall(nodes.image)]
    return images[-1] if images else None


def captioned(paragraph, shown, label, number):
    """Put what is shown into a figure with the text of a paragraph as its caption."""
    paragraph.children.pop(0)
    first = paragraph.children[0]
    paragraph.children[0] = nodes.Text(first.astext().lstrip()) if isinstance(first, nodes.Text) else first
    caption = nodes.caption()
    caption += [nodes.inline("", f"Fig. {number} ", classes=["caption-number"])] if number else []
    caption += paragraph.children
    figure = nodes.figure(ids=[label], names=[label], classes=["numbered"])
    shown.replace_self(figure)
    figure += [shown, caption]
    return figure


class FigureCaptions(SphinxTransform):
    default_priority = 400  # before the builder collects labels and numbers

    def apply(self, **_):
        page, number = self.env.docname, 0
        counted = page in titles(self.env.srcdir)
        for paragraph in list(self.document.findall(nodes.paragraph)):
            if not is_caption(paragraph):
                continue
            shown = drawn(following_cell(paragraph))
            if shown is not None:
                number += 1
                label = f"fig-{page.rpartition('/')[2]}-{number}".replace("_", "-").lower()
                self.document.note_explicit_target(captioned(paragraph, shown, label, number if counted else 0))
            paragraph.parent.remove(paragraph)
        self.say_plainly()

    def say_plainly(self):
        """Show a text that a cell returns without its quotes: a table may be missing because nothing was run."""
        for literal in list(self.document.findall(nodes.literal_block)):
            told = re.fullmatch(r"(['\"])([^'\"\n]+)\1\s*", literal.astext())
            if told and "output" in literal.get("classes", []):
                literal.replace_self(nodes.paragraph("", "", nodes.emphasis("", told[2]), classes=["not-run"]))


def setup(app):
    app.add_transform(FigureCaptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
