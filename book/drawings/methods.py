"""Drawings of the steps of each method, as a row of small pictures legible on a phone.

Strokes have the colour of the page's text in light and dark mode; other colours are those of the figures.
"""

import math
from pathlib import Path

from pruning_lib.report import plots

HERE = Path(__file__).parent
HEAD, NEURON, GONE = plots.COLOUR["amp"], plots.COLOUR["magnitude"], plots.COLOUR["highest"]
METRICS = [plots.CRITERION[name][0] for name in ("cka", "permutation", "wasserstein")]
ADDS = {"heads": (9, 2.5, 6), "neurons": (5, 8, 1.5, 6.5)}  # contribution of each part; the smallest are removed
LOWEST = {"heads": 1, "neurons": 2}


def rect(x, y, w, h, fill="none", **more):
    given = {"rx": 2, **more}
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in given.items())
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"{extra}/>'


def line(path, width=1.5, colour="currentColor", **more):
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linecap="round"{extra}/>'


def words(x, y, text, **more):
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:g}" y="{y:g}"{extra}>{text}</text>'


def arrow(x1, y1, x2, y2, width=1.5, colour="currentColor"):
    """Return a straight arrow; its tip grows slightly with its width."""
    angle, tip = math.atan2(y2 - y1, x2 - x1), 4 + width
    left, right = ((x2 - tip * math.cos(angle + s), y2 - tip * math.sin(angle + s)) for s in (0.5, -0.5))
    stop = (x2 - 0.8 * tip * math.cos(angle), y2 - 0.8 * tip * math.sin(angle))
    return line(f"M{x1:g} {y1:g}L{stop[0]:.1f} {stop[1]:.1f}", width, colour) + (
        f'<path d="M{x2:g} {y2:g}L{left[0]:.1f} {left[1]:.1f}L{right[0]:.1f} {right[1]:.1f}Z" fill="{colour}"/>')


def cross(x, y, r):
    return line(f"M{x - r:g} {y - r:g}L{x + r:g} {y + r:g}M{x + r:g} {y - r:g}L{x - r:g} {y + r:g}", 2, GONE)


def part(kind, x, y, gone=False):
    """Return a circle for a head or a square for a neuron; a removed part is hollow and crossed out."""
    colour = HEAD if kind == "heads" else NEURON
    look = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="2 2"' if gone else f'fill="{colour}"'
    shape = f'<circle cx="{x:g}" cy="{y:g}" r="6" {look}/>' if kind == "heads" else (
        f'<rect x="{x - 4.5:g}" y="{y - 4.5:g}" width="9" height="9" rx="1.5" {look}/>')
    return shape + (cross(x, y, 8 if kind == "heads" else 6.5) if gone else "")


def places():
    """Return (kind, number, y, contribution) of every part, from above."""
    rows = [(kind, i, added) for kind, sizes in ADDS.items() for i, added in enumerate(sizes)]
    return [(kind, i, 9 + 14 * place + (4 if kind == "neurons" else 0), added)
            for place, (kind, i, added) in enumerate(rows)]


def prompts():
    return "".join(rect(18 + 14 * token, 16 + 24 * row, 11, 15, "currentColor", opacity=0.35 + 0.12 * (token % 3))
                   for row, length in enumerate((4, 6, 3)) for token in range(length))


def additions():
    return line("M96 4V106", 6, "currentColor", opacity=0.3) + "".join(
        part(kind, 24, y) + arrow(34, y, 93, y, added / 2.2, HEAD if kind == "heads" else NEURON)
        for kind, _, y, added in places())


def scores():
    return "".join(part(kind, 14, y) + rect(27, y - 4, 9.5 * added, 8, HEAD if kind == "heads" else NEURON)
                   for kind, _, y, added in places())


def cut():
    return scores().replace("<rect x=\"27\"", '<rect opacity=".3" x="27"') + "".join(
        rect(4, y - 7, 108, 14, GONE, opacity=0.14) + cross(14, y, 7)
        for kind, i, y, _ in places() if i == LOWEST[kind])


def checkpoint():
    kept = [(kind, i) for kind, i, *_ in places() if i != LOWEST[kind]]
    heads, neurons = ([i for k, i in kept if k == kind] for kind in ADDS)
    return (line("M28 8H78L94 24V102H28Z", 1.8, stroke_linejoin="round") + line("M78 8V24H94", 1.8)
            + "".join(part("heads", 48 + 26 * n, 46) for n, _ in enumerate(heads))
            + "".join(part("neurons", 43 + 18 * n, 68) for n, _ in enumerate(neurons))
            + line("M42 86H80", 2, opacity=0.5))


def chain(gone, *, closed):
    """Return four blocks in a row, with the ``gone`` one skipped or removed."""
    picture = line("M2 55H118", 1.5, opacity=0.45)
    for place in range(4):
        x = 8 + 28 * place
        if place != gone:
            picture += rect(x, 40, 20, 30, HEAD)
        elif closed:
            picture += rect(x, 40, 20, 30, "none", stroke=GONE, stroke_width=1.5, stroke_dasharray="3 2")
            picture += cross(x + 10, 55, 9)
        else:
            picture += rect(x, 40, 20, 30, "none", stroke="currentColor", stroke_width=1.5, stroke_dasharray="3 2")
            picture += line(f"M{x - 4} 55C{x - 4} 12 {x + 24} 12 {x + 24} 48", 1.8) + arrow(x + 24, 44, x + 24, 53)
    return picture


def clouds():
    points = [(math.cos(2.4 * n) * 4.2 * math.sqrt(n), math.sin(2.4 * n) * 3.2 * math.sqrt(n)) for n in range(1, 26)]
    turned = [(0.94 * x - 0.34 * y, 0.34 * x + 0.8 * y) for x, y in points]
    dots = "".join(f'<circle cx="{middle + x:.1f}" cy="{50 + y:.1f}" r="2.2" fill="{colour}"/>'
                   for middle, cloud, colour in ((30, points, "#8a949e"), (90, turned, HEAD)) for x, y in cloud)
    pair = line("M53 50H67", 1.5, stroke_dasharray="2 3") + words(60, 43, "?", text_anchor="middle", font_size=15)
    return dots + pair + words(30, 90, "X", text_anchor="middle", font_style="italic") + words(
        90, 90, "Y", text_anchor="middle", font_style="italic")


def ranks():
    """Return the ranks of the chapter's worked example."""
    table = {"a": (0, 2, 1), "b": (2, 0, 0), "c": (1, 1, 3), "d": (3, 3, 2)}
    picture = "".join(rect(26 + 20 * column, 4, 16, 6, colour) for column, colour in enumerate(METRICS))
    picture += words(102, 12, "sum", text_anchor="middle", font_size=11)
    for row, (name, places_) in enumerate(table.items()):
        y = 32 + 23 * row
        if name == "b":
            picture += rect(2, y - 15, 114, 21, HEAD, opacity=0.2)
        picture += words(12, y, name, text_anchor="middle")
        picture += "".join(words(34 + 20 * column, y, place, text_anchor="middle")
                           for column, place in enumerate(places_))
        picture += words(102, y, sum(places_), text_anchor="middle", font_weight="bold")
    return picture


def again():
    curve = line("M16 16V92H106", 1.5, opacity=0.6) + line("M22 40L34 74C44 46 60 38 98 36", 2.5, HEAD)
    return curve + f'<circle cx="34" cy="74" r="3.5" fill="{GONE}"/>' + words(40, 86, "cut", font_size=11) + words(
        68, 30, "tuned", font_size=11)


METHODS = {
    "amp": ("How AMP works, in five steps", (
        ("Prompts go in", prompts, "A few, of any length; each weighs the same."),
        ("Every part adds", additions, "Heads (round) and neurons (square) write into the residual stream."),
        ("One score each", scores, "How much it adds, averaged over tokens and prompts."),
        ("The lowest go", cut, "In every block equally many heads and neurons."),
        ("A plain checkpoint", checkpoint, "Smaller, and loaded without this library."))),
    "consensus": ("How Consensus works, in five steps and again", (
        ("One block is left out", lambda: chain(2, closed=False), "Each in its turn; the shortcut carries on."),
        ("Have features moved?", clouds, "With the block <i>X</i>, without it <i>Y</i>: eight distances."),
        ("Ranks are added", ranks, "A row for each block, a column for each metric."),
        ("The lowest sum goes", lambda: chain(1, closed=True), "The block hardly anybody would miss."),
        ("Tune, and again", again, "Accuracy is won back; then all is measured anew."))),
}


def draw(method):
    title, steps = METHODS[method]
    items = "\n".join(
        f'<li><svg viewBox="0 0 120 110" aria-hidden="true" font-size="14" fill="currentColor">{picture()}</svg>'
        f'<div><strong>{name}</strong> <span>{text}</span></div></li>' for name, picture, text in steps)
    return f'<figure class="method {method}" aria-label="{title}">\n<ol>\n{items}\n</ol>\n</figure>\n'


if __name__ == "__main__":
    for name in METHODS:
        (HERE / f"{name}.html").write_text(draw(name))
