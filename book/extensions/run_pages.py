"""Pages of runs: a title that names the run, no entry in the contents, and a way back to the list of all runs.

``_runs.json`` has the title of each page.  ``pruning_lib.report.book`` writes it before the builder starts.
"""

import functools
import json
from pathlib import Path

from docutils import nodes

LIST = "chapters/runs"


@functools.cache
def titles(folder):
    """Return name of a page -> its title; nothing for a book without runs."""
    path = Path(folder) / "_runs.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def name_page(app, doctree):
    """Replace the title of a run's page, which all runs of one notebook share."""
    title = titles(app.srcdir).get(app.env.docname)
    heading = doctree.next_node(nodes.title)
    if title and heading:
        heading.children = [nodes.Text(title)]


def keep_out_of_contents(app, doctree):
    """Mark a page of a run as one that belongs to no table of contents."""
    if app.env.docname in titles(app.srcdir):
        app.env.metadata[app.env.docname]["orphan"] = True


def lead_back(app, pagename, templatename, context, doctree):
    """Add a line above the page of a run that leads to the list of all runs."""
    if doctree is not None and pagename in titles(app.srcdir) and LIST in app.env.all_docs:
        link = context["pathto"](LIST)
        context["body"] = (f'<p class="run-of"><a href="{link}">All runs</a> / {pagename.rpartition("/")[2]}</p>'
                           + context["body"])


def setup(app):
    app.connect("doctree-read", name_page, priority=100)  # before the builder collects titles
    app.connect("doctree-read", keep_out_of_contents, priority=900)  # after it has collected metadata
    app.connect("html-page-context", lead_back, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
