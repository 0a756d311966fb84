"""Interactive map of the AMP chapter from the measurements of measure_head_map.py.

The drawing is complete without a script and shows the cut at START.  _static/head_map.js moves the cut.
"""

import base64
import io
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
START = ("same", 20)  # split, and percent of all parameters
CELL, ROW, GROUP = 24, 10, 3  # width and height of a head's square; heads of one key/value group are adjacent
WIDE, LEFT = 223, 30  # width of the map of neurons, space for block numbers


def colours(values, top):
    return (mpl.colormaps["viridis"](np.clip(np.array(values) / top, 0, 1))[..., :3] * 255).astype(np.uint8)


def heads(found):
    top = np.quantile(found["heads"], 0.98)
    (split, percent) = START
    gone = found["gone"][str(found["steps"][split][percent][0])]
    last = len(found["heads"]) - 1
    for block, (row, looks) in enumerate(zip(found["heads"], colours(found["heads"], top), strict=True)):
        for head, (share, rgb) in enumerate(zip(row, looks, strict=True)):
            fate = " gone" if head in gone[block] else ""
            x = LEFT + head * CELL + head // GROUP * 4
            yield (f'<rect class="head{fate}" x="{x}" y="{(last - block) * ROW}" width="{CELL - 1}" '
                   f'height="{ROW - 1}" fill="#{bytes(rgb).hex()}">'
                   f'<title>block {block}, head {head}: {share:.2f} of the mean</title></rect>')


def neurons(found):
    """Return an image with one pixel per bin, and the overlay of removed neurons."""
    pixels = Image.fromarray(colours(found["neurons"], np.quantile(found["neurons"], 0.98))[::-1])
    file = io.BytesIO()
    pixels.save(file, "png", optimize=True)
    high = len(found["neurons"]) * ROW
    share = found["steps"][START[0]][START[1]][1] / found["neurons_of_a_block"]
    return (f'<image x="{LEFT}" y="0" width="{WIDE}" height="{high}" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>'
            f'<rect class="veil" x="{LEFT}" y="0" width="{WIDE * share:.1f}" height="{high}"/>'
            f'<rect class="curtain" data-width="{WIDE}" x="{LEFT}" y="0" width="{WIDE * share:.1f}" height="{high}"/>')


def blocks(count):
    """Return the block numbers at the left edge, first block at the bottom."""
    return "".join(f'<text x="{LEFT - 6}" y="{(count - block) * ROW - 1}">{block}</text>'
                   for block in range(0, count, 5))


def sentence(step, found):
    """Return a description of the cut, as in head_map.js."""
    n_heads, n_neurons, fraction, lost_heads, lost_neurons = step
    return (f"{100 * fraction:.1f} % of all parameters: {n_heads} of {len(found['heads'][0])} heads and "
            f"{n_neurons:,} of {found['neurons_of_a_block']:,} neurons of every block. With them go "
            f"{100 * lost_heads:.0f} % of the heads' and {100 * lost_neurons:.0f} % of the neurons' importance.")


def draw(found):
    count, (split, percent) = len(found["heads"]), START
    size = (LEFT + WIDE, count * ROW)
    data = json.dumps({key: found[key] for key in ("steps", "gone", "neurons_of_a_block")}, separators=(",", ":"))
    return f"""<figure class="head-map" id="head-map">
<div class="controls">
<label>Parameters removed <input type="range" min="0" max="50" step="1" value="{percent}">\
<output>{percent} %</output></label>
<fieldset><legend>Taken from</legend>
<label><input type="radio" name="head-map-split" value="same" checked> heads and neurons alike</label>
<label><input type="radio" name="head-map-split" value="neurons"> neurons only</label></fieldset>
</div>
<p class="said" aria-live="polite">{sentence(found["steps"][split][percent], found)}</p>
<div class="maps">
<div><p class="what">Heads, in their three groups</p>
<svg viewBox="0 0 {size[0]} {size[1]}" role="img" \
aria-label="Importance of {len(found['heads'][0])} heads in {count} blocks; \
what goes is hatched">
<defs><pattern id="head-map-hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">\
<path d="M0 0V5" stroke="currentColor" stroke-width="1.6" opacity=".55"/></pattern></defs>
<style>.head-map .gone, .head-map .curtain {{ fill: url(#head-map-hatch); }}</style>
{blocks(count)}
{chr(10).join(heads(found))}</svg></div>
<div><p class="what">Neurons of each block, least important first</p>
<svg viewBox="0 0 {size[0]} {size[1]}" role="img" \
aria-label="Importance of the neurons of {count} blocks, sorted; \
what goes is hatched">{blocks(count)}{neurons(found)}</svg></div>
</div>
<figcaption>What AMP removes from SmolLM2-135M-Instruct. A row is a block, the first one at the bottom. The darker, \
the less a part adds, as a share of its block's mean; what goes is hatched.</figcaption>
<script type="application/json">{data}</script>
</figure>
"""


if __name__ == "__main__":
    (HERE / "head_map.html").write_text(draw(json.loads((HERE / "head_map.json").read_text())))
