"""Smaller site: unused files are deleted, and figures are stored in 256 colours.

Deleted are source maps, unused builds of MathJax and their files, speech rules for other languages, and older formats
of fonts.  Figures in full colour have three times the size without a visible difference, and each is stored twice, in
a page and in a notebook for download.
"""

import base64
import functools
import io
import json
import shutil

from PIL import Image

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
        if font.with_suffix(".woff2").is_file():  # preferred by every browser
            font.unlink()
    for figure in app.outdir.glob("_images/*.png"):
        figure.write_bytes(few_colours(figure.read_bytes()))
    for notebook in app.outdir.glob("_sources/**/*.ipynb"):
        notebook.write_text(with_small_figures(notebook.read_text()))


@functools.cache
def few_colours(png):
    """Return the image in 256 colours if that is smaller and nothing is transparent."""
    with Image.open(io.BytesIO(png)) as image:
        if image.mode == "P" or image.convert("RGBA").getextrema()[3][0] < 255:
            return png
        beside = io.BytesIO()
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(beside, "PNG", optimize=True)
    return min(png, beside.getvalue(), key=len)


def with_small_figures(notebook):
    """Return the text of a notebook with its figures in 256 colours, and everything else unchanged."""
    found = json.loads(notebook)
    for cell in found["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                png = base64.b64decode("".join(output["data"]["image/png"]))
                output["data"]["image/png"] = base64.b64encode(few_colours(png)).decode()
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def setup(app):
    app.connect("build-finished", trim, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
