"""Search results: each page once, chapters before readings, readings before runs."""

import json
from pathlib import Path

SCRIPT = Path(__file__).with_name("search_once.js")


def extend(app, failed):
    """Append our script to the builder's search, which runs when its index arrives."""
    search = Path(app.outdir) / "_static" / "searchtools.js"
    if failed or app.builder.format != "html" or not search.is_file():
        return
    runs = sorted(name for name, about in app.env.metadata.items() if "orphan" in about)
    found = search.read_text()
    if SCRIPT.name not in found:
        search.write_text(f"{found}\n// {SCRIPT.name}\nconst RUNS = new Set({json.dumps(runs)});\n{SCRIPT.read_text()}")


def setup(app):
    app.connect("build-finished", extend, priority=800)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
