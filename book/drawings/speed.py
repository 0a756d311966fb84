"""Table and curves of the library's speed beside a plain way and the floor, from the measurements alone.

``tests/benchmarks/bench.py --write`` measures, writes the table and calls ``write``.
"""

import csv
from pathlib import Path

from pruning_lib import _files

BOOK = Path(__file__).resolve().parents[1]
TABLE, CURVES = BOOK / "_static" / "speed.csv", BOOK / "_static" / "speed.png"
WORDS = Path(__file__).with_suffix(".md")
COLUMNS = ["computation", "size", "unit", "ours, s", "plain, s", "floor, s", "memory, MB"]


def read(path=TABLE):
    """Return the rows of the table, with numbers, and the line of conditions."""
    *lines, last = list(csv.reader(path.open()))[1:]
    return [[what, int(size), unit, *map(float, numbers)] for what, size, unit, *numbers in lines], last[0]


def words(rows, conditions):
    """Return the largest size of every computation as a table in Markdown, and the conditions."""
    lines = ["| computation | size | ours, s | plain, s | plain / ours | floor, s | ours / floor | memory, MB |",
             "| --- | --- " + "| ---: " * 6 + "|"]
    largest = {row[0]: row for row in rows}  # the last of each
    for what, size, unit, ours, plain, floor, memory in largest.values():
        lines.append(f"| {what} | {size:,} {unit} | {ours:.2f} | {plain:.2f} | {plain / ours:.2f} | {floor:.2f} | "
                     f"{ours / floor:.1f} | {memory:.0f} |")
    return "\n".join(lines) + f"\n\n{conditions[0].upper()}{conditions[1:]}.\n"


def draw(rows, path=CURVES):
    """Draw the three times of each computation against its size."""
    import matplotlib.pyplot as plt

    from pruning_lib.report import plots

    kinds = list(dict.fromkeys(row[0] for row in rows))
    with plots.style():
        fig, axes = plt.subplots(len(kinds), 1, figsize=(6, 2.3 * len(kinds)))
        for ax, kind in zip(axes, kinds, strict=True):
            found = [row for row in rows if row[0] == kind]
            for column, name, marker in ((4, "plain", "s"), (3, "ours", "o"), (5, "floor", "^")):
                ax.plot([row[1] for row in found], [row[column] for row in found], marker=marker, label=name)
            ax.set(title=kind, xlabel=found[0][2], ylabel="processor seconds")
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
    rows, conditions = read()
    WORDS.write_text(words(rows, conditions))
    draw(rows)


if __name__ == "__main__":
    write()
