"""Logo of the book, a grid without its least important parts, as favicon, logo and social card."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from pruning_lib.report import plots

STATIC = Path(__file__).resolve().parents[1] / "_static"
BLUE, SKY = plots.COLOUR["amp"], plots.COLOUR["activation_norm"]
KEPT = ("BsB", "B.s", "sB.")  # rows of the mark, from above: a dot is a removed part


def mark(ax, x, y, size):
    """Return the mark with its lower left corner at (x, y)."""
    cell = size / 3
    for row, line in enumerate(KEPT):
        for column, kind in enumerate(line):
            corner = (x + (column + 0.12) * cell, y + (2 - row + 0.12) * cell)
            look = {"fill": False, "edgecolor": "#8a949e", "linewidth": 0.015 * size,
                    "linestyle": (0, (2, 1.4))} if kind == "." else {
                        "facecolor": BLUE if kind == "B" else SKY, "linewidth": 0}
            ax.add_patch(FancyBboxPatch(corner, 0.76 * cell, 0.76 * cell,
                                        boxstyle=f"round,pad=0,rounding_size={0.16 * cell}", **look))


def canvas(width, height, background="none"):
    """Return an empty figure of the given pixels, one unit each."""
    fig = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor=background)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return fig, ax


def save(fig, name):
    fig.savefig(STATIC / name, dpi=100, facecolor=fig.get_facecolor(), metadata={"Software": None})
    plt.close(fig)


if __name__ == "__main__":
    for name, size in (("favicon.png", 64), ("logo.png", 192)):
        fig, ax = canvas(size, size)
        mark(ax, 0, 0, size)
        save(fig, name)
    fig, ax = canvas(1200, 630, "white")
    mark(ax, 80, 150, 330)
    ax.text(465, 375, "Structured pruning,\nre-run", fontsize=40, weight="bold", va="center", linespacing=1.25)
    ax.text(467, 215, "An executable book: make a trained network\nsmaller, and see what it costs", fontsize=21,
            color="#444444", va="center", linespacing=1.5)
    save(fig, "card.png")
