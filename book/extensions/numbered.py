"""Numbered figures: the directive ``numbered`` puts a caption under a drawing, a quoted figure or a widget.

    ```{numbered} fig-votes
    :drawing: votes.svg
    The caption.
    ```

The argument is the label of the figure.  ``drawing`` is a file of ``drawings``; its text becomes part of the page, so
that it follows light and dark mode.  ``glue`` and ``page`` quote a figure that a reading has glued.
"""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective


class Numbered(SphinxDirective):
    required_arguments = 1
    has_content = True
    option_spec = {"drawing": directives.unchanged_required, "glue": directives.unchanged_required,
                   "page": directives.unchanged_required}

    def run(self):
        label = self.arguments[0]
        caption = nodes.caption()
        held = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, held)
        if held.children:
            caption += held.children[0].children
        figure = nodes.figure("", *self.shown(), caption, ids=[label], names=[label], classes=["numbered"])
        self.set_source_info(figure)
        self.state.document.note_explicit_target(figure)
        return [figure]

    def shown(self):
        if "drawing" in self.options:
            path = Path(self.env.srcdir) / "drawings" / self.options["drawing"]
            self.env.note_dependency(str(path))
            return [nodes.raw("", path.read_text(), format="html")]
        held = nodes.Element()
        lines = [f"```{{glue}} {self.options['glue']}", f":doc: {self.options['page']}", "```"]
        self.state.nested_parse(lines, self.content_offset, held)
        return held.children


def setup(app):
    app.add_directive("numbered", Numbered)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
