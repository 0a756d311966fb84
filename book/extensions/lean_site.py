"""What no page of the site asks for is not published.

Maps for debugging scripts, other builds of MathJax and what only they load, its rules for reading formulas aloud in
languages that the book is not written in, and fonts of an older format beside the same font of a newer one.
"""

import shutil

NOT_ASKED_FOR = ["_static/**/*.map", "_static/mathjax/*-svg*.js", "_static/mathjax/*mml-*.js",
                 "_static/mathjax/tex-chtml-*.js", "_static/mathjax/node-main.js", "_static/mathjax/output/svg*",
                 "_static/mathjax/input/tex-full.js", "_static/mathjax/input/mml/extensions/mml3*"]
READ_ALOUD = {"base", "en", "nemeth"}  # the last one for Braille


def trim(app, failed):
    if failed or app.builder.format != "html":
        return
    for pattern in NOT_ASKED_FOR:
        for path in list(app.outdir.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for rules in list(app.outdir.glob("_static/mathjax/sre/mathmaps/*.json")):
        if rules.stem not in READ_ALOUD:
            rules.unlink()
    for font in list(app.outdir.glob("_static/**/*.ttf")):
        if font.with_suffix(".woff2").is_file():  # which every browser takes first
            font.unlink()


def setup(app):
    app.connect("build-finished", trim, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
