"""Numbered figures: the directive ``numbered`` puts a caption under a drawing, a quoted figure or a widget.

    ```{numbered} fig-votes
    :drawing: votes.svg
    The caption.
    ```

The argument is the label of the figure.  ``drawing`` is a file of ``drawings``; its text becomes part of the page, so
that it follows light and dark mode.  ``widget`` is a function of ``drawings/widgets.py``, which draws from the records
of the day.  ``glue`` and ``page`` quote a figure that a reading has glued.
"""

import importlib.util
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective


class Numbered(SphinxDirective):
    required_arguments = 1
    has_content = True
    option_spec = dict.fromkeys(("drawing", "widget", "glue", "page"), directives.unchanged_required)

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
            drawing = path.read_text() if path.suffix != ".svg" else f'<div class="drawing">{path.read_text()}</div>'
            return [nodes.raw("", drawing, format="html")]
        if "widget" in self.options:
            self.env.note_reread()  # records change without a change of the page
            return [nodes.raw("", widget(Path(self.env.srcdir), self.options["widget"]), format="html")]
        held = nodes.Element()
        lines = [f"```{{glue}} {self.options['glue']}", f":doc: {self.options['page']}", "```"]
        self.state.nested_parse(lines, self.content_offset, held)
        return held.children


def widget(book, name):
    """Return the HTML of a widget; the module with its drawings belongs to the book, not to the package."""
    spec = importlib.util.spec_from_file_location("widgets", book / "drawings" / "widgets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WIDGETS[name]()


def setup(app):
    app.add_directive("numbered", Numbered)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
