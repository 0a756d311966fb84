"""Numbers of sources in docstrings as plain text, because numbering restarts in every module."""

import re


def plain(app, what, name, obj, options, lines):
    lines[:] = [re.sub(r"\[(\d)\]_", r"[\1]", re.sub(r"^\.\. \[(\d)\] ", r"| [\1] ", line)) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", plain)
    return {"parallel_read_safe": True}
