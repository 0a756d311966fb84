"""What no page of the site asks for is not published: maps for debugging scripts, other builds of MathJax."""

import shutil

NOT_ASKED_FOR = ["_static/**/*.map", "_static/mathjax/*-svg*.js", "_static/mathjax/*mml-*.js",
                 "_static/mathjax/tex-chtml-*.js", "_static/mathjax/node-main.js", "_static/mathjax/output/svg*"]


def trim(app, failed):
    if failed or app.builder.format != "html":
        return
    for pattern in NOT_ASKED_FOR:
        for path in list(app.outdir.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def setup(app):
    app.connect("build-finished", trim, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
