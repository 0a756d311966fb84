"""Curves of the growth of cost and a description of their bends, from the table of measurements alone.

``tests/benchmarks/bench_growth.py --rows --write`` measures, writes the table and calls ``write``.
Order of this file: table · exponents and bends · text · curves.
"""

import csv
import math
from itertools import pairwise
from pathlib import Path

from pruning_lib import _files

BOOK = Path(__file__).resolve().parents[1]
TABLE, CURVES = BOOK / "_static" / "growth.csv", BOOK / "_static" / "growth.png"
WORDS = Path(__file__).with_suffix(".md")
BEND = 0.2  # change of the exponent between steps above noise; 5 % of a time correspond to 0.1
SMALL_MB = 1.0  # smaller amounts are noise of the allocator
KINDS = {"tokens": "tokens of a prompt", "blocks": "blocks", "prompts": "prompts", "width": "parameters, by width",
         "workers": "workers, rows at a time"}


def read(path=TABLE):
    """Return kind -> list of (number, seconds, MB), and the line of conditions."""
    lines = list(csv.reader(path.open()))[1:]
    points = {}
    for kind, to, parameters, seconds, memory in lines[:-1]:
        number = parameters if kind == "width" else to
        points.setdefault(kind, []).append((int(number), float(seconds), float(memory)))
    return points, lines[-1][0]


def exponents(points, column=1):
    """Return the exponent p of each step: a factor n in size costs a factor n^p."""
    return [math.log(b[column] / a[column]) / math.log(b[0] / a[0]) for a, b in pairwise(points)]


def bends(points):
    """Return (number, exponent before, exponent after) of every bend of the time curve above noise."""
    return [(point[0], before, after) for point, (before, after) in
            zip(points[1:-1], pairwise(exponents(points)), strict=True) if abs(after - before) >= BEND]


def words(points, conditions):
    """Return a table of exponents and bends in Markdown, with missing measurements named."""
    lines = ["| what grows | from, to | power of time | at each step | bends | memory |", "| --- " * 6 + "|"]
    for kind, name in KINDS.items():
        if kind in points:
            lines.append(f"| {' | '.join([name, *_row(points[kind])])} |")
    missing = [name for kind, name in KINDS.items() if kind not in points]
    said = f"\nNot measured here yet: {'; '.join(missing)}.\n" if missing else ""
    return "\n".join(lines) + f"\n\n{conditions[0].upper()}{conditions[1:]}.\n{said}"


def _row(points):
    (first, *_), (last, *_) = points[0], points[-1]
    whole = exponents([points[0], points[-1]])[0]
    steps = ", ".join(f"{p:.2f}" for p in exponents(points))
    turns = "; ".join(f"{'up' if after > before else 'down'} at {number:,}" for number, before, after in bends(points))
    memory = [point[2] for point in points]
    if max(memory) < SMALL_MB:
        grows = f"below {SMALL_MB:g} MB"
    else:
        grows = f"{memory[0]:g} to {memory[-1]:g} MB"
        if min(memory) >= SMALL_MB:
            grows += f", power {exponents([points[0], points[-1]], 2)[0]:.2f}"
    return f"{first:,} to {last:,}", f"{whole:.2f}", steps, turns or "none", grows


def draw(points, path=CURVES):
    """Draw time and memory against each quantity, relative to the first point, with bends marked."""
    import matplotlib.pyplot as plt

    from pruning_lib.report import plots

    with plots.style():
        fig, axes = plt.subplots(2, 1, figsize=(6, 8.4))
        for kind, found in points.items():
            first, turns = found[0], {number for number, *_ in bends(found)}
            grown = [point[0] / first[0] for point in found]
            line, = axes[0].plot(grown, [point[1] / first[1] for point in found], marker="o", label=KINDS[kind])
            marked = [(point[0] / first[0], point[1] / first[1]) for point in found if point[0] in turns]
            axes[0].plot(*zip(*marked, strict=True) if marked else ([], []), "o", ms=13, mfc="none", c=line.get_color())
            if min(point[2] for point in found) >= SMALL_MB:
                axes[1].plot(grown, [point[2] / first[2] for point in found], marker="o", c=line.get_color())
        for ax, what in zip(axes, ("time", "memory"), strict=True):
            ax.set(xlabel="times as much", ylabel=f"{what}, times the first")
            for axis in "xy":
                plots.log_ticks(ax, axis, leading=(1, 2, 5))
        axes[0].legend(fontsize=9)
        fig.savefig(path, metadata={"Description": digest()})
        plt.close(fig)


def digest(path=TABLE):
    """Return the digest of the table, stored in the figure to identify its measurements."""
    return _files.digest(path)


def write():
    """Write text and curves of the current table."""
    points, conditions = read()
    WORDS.write_text(words(points, conditions))
    draw(points)


if __name__ == "__main__":
    write()
