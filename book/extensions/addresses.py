"""External links of the book from one setting, ``repository: url:`` of _config.yml.

Without an address the book has no edit, source or launch buttons.  With an address, edit links lead to the notebook of
a page instead of the page, because the next run overwrites the page.  A notebook can be downloaded either way.
"""

import html
import json
import re
from pathlib import Path

from docutils import nodes

BUTTONS = ("use_repository_button", "use_source_button", "use_edit_page_button", "use_issues_button")
LAUNCH = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org",
          "colab_url": "https://colab.research.google.com"}


def options(repository):
    """Return the options of the theme for a repository address, which may be empty."""
    known = bool(repository)
    return {**dict.fromkeys(BUTTONS, known), "launch_buttons": LAUNCH if known else {}}


def site(repository):
    """Return the address of the book on GitHub Pages; '' for any other host."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?", repository)
    return f"https://{found[1].lower()}.github.io/{found[2]}/" if found else ""


def configure(app, config):
    repository = config.html_theme_options.get("repository_url", "")
    config.html_theme_options.update(options(repository))
    config.html_baseurl = config.html_baseurl or site(repository)
    config.html_context.setdefault("default_mode", "auto")  # the theme warns on every page if it is not set


def made_from(app, pagename):
    """Return row and notebook of a page under executed/, else nothing."""
    source = Path(app.env.doc2path(pagename)) if pagename.startswith("executed/") else Path()
    if source.suffix == ".ipynb":
        about = json.loads(source.read_text())["metadata"].get("pruning_lib", {})
        return about.get("row", source.stem), about.get("notebook", source.stem)
    return None


def complete(app, pagename, templatename, context, doctree):
    if doctree is not None:
        context["metatags"] = context.get("metatags", "") + card(app, pagename, context, doctree)
    made = made_from(app, pagename) if doctree is not None else None
    if made:
        row, notebook = made
        lead_to_source(context.get("header_buttons", []), f"executed/{Path(pagename).name}.ipynb", notebook)
        context["body"] += run_it(context["pathto"](f"_sources/{pagename}.ipynb", 1), row,
                                  app.config.html_theme_options.get("repository_url", ""))


def lead_to_source(buttons, page, notebook):
    """Link the edit and source buttons of an executed page to its notebook."""
    for button in buttons:
        lead_to_source(button.get("buttons", []), page, notebook)
        if button.get("label") in ("source-edit-button", "source-file-button"):
            button["url"] = re.sub(rf"[\w-]+/{re.escape(page)}", f"notebooks/{notebook}.ipynb", button["url"])


def run_it(download, row, repository):
    colab = f" In Colab, first install the library: <code>%pip install git+{html.escape(repository)}</code>." \
        if repository else ""
    return (f'<aside class="run-it" aria-label="Run this page"><p><strong>Run this page.</strong> '
            f'<a href="{download}" download>Download the notebook</a> as it was run, '
            f'or make it anew: <code>pruning-lib run {html.escape(row)}</code>.{colab}</p></aside>')


def card(app, pagename, context, doctree):
    """Return the metadata of a page for link previews."""
    paragraph = doctree.next_node(nodes.paragraph)
    text = " ".join(paragraph.astext().split())[:200] if paragraph else app.config.html_title
    base = app.config.html_baseurl
    image = f"{base}_static/card.png" if base else context["pathto"]("_static/card.png", 1)
    tags = {"og:type": "article", "og:title": re.sub("<[^>]*>", "", context["title"]), "og:description": text,
            "og:site_name": app.config.html_title, "og:image": image,
            "og:image:alt": "Heads and neurons of a network, the least important ones taken out"}
    lines = [f'<meta property="{key}" content="{html.escape(html.unescape(value))}" />' for key, value in tags.items()]
    lines.append(f'<meta name="description" content="{html.escape(text)}" />')
    return "\n" + "\n".join([*lines, '<meta name="twitter:card" content="summary_large_image" />']) + "\n"


def setup(app):
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", complete, priority=900)  # after the theme has made its buttons
    return {"parallel_read_safe": True, "parallel_write_safe": True}
