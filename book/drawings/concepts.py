"""Drawings of eight concepts, one each, as SVG that takes the colour of the page's text in light and dark mode.

Every number in a drawing is computed here from the numbers of the worked example in its chapter.
"""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("methods", HERE / "methods.py")
methods = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(methods)
rect, line, words, arrow, cross = methods.rect, methods.line, methods.words, methods.arrow, methods.cross
HEAD, NEURON, GONE = methods.HEAD, methods.NEURON, methods.GONE
VOTES = {"a": (0, 2, 1), "b": (2, 0, 0), "c": (1, 1, 3), "d": (3, 3, 2)}  # ranks of the chapter on Consensus
ADDED = {"head A": (3, 0, 0, 0), "head B": (1, 1, 1, 1)}  # of the chapter on L1
SHAPES = {"same axes": ((3, 1), (1, 2)), "turned by a right angle": ((2, 1), (1, 2))}  # half-axes, chapter on Bures
STEPS = ((1988, "relevance of units"), (1989, "saliency"), (2015, "magnitude"), (2017, "filters, channels"),
         (2019, "doubts: lottery tickets"), (2020, "heads, blocks, graphs"), (2023, "language models"),
         (2024, "prune, then distil"))
A, B = (1, 2, 2), (2, 5, 3)  # outputs of two neurons, from the chapter Beyond AMP
WEIGHT_A, WEIGHT_B = 1, 2


def middle(x, y, text, **more):
    return words(x, y, text, text_anchor="middle", **more)


def head_adds():
    """Draw the worked example of the chapter: two heads add a vector to the stream for each of two tokens."""
    outputs, directions = ((2, 0), (-1, 1)), ((1, 1), (0, 3))
    picture = words(8, 20, "head output &#215; its columns of W = vector added to the stream, with its size (L1)")
    for head, direction in enumerate(directions):
        total = 0
        for token, values in enumerate(outputs):
            y, added = 60 + 100 * head + 40 * token, [values[head] * part for part in direction]
            size = sum(map(abs, added))
            total += size
            picture += f'<circle cx="24" cy="{y - 5}" r="9" fill="{HEAD}"/>' + words(
                40, y, f"head {head + 1}, token {token + 1}: "
                       f"{values[head]} &#215; {direction} = ({added[0]}, {added[1]})")
            picture += rect(330, y - 14, 22 * size, 14, HEAD) + words(336 + 22 * size, y - 2, size)
        picture += words(500, 80 + 100 * head, f"mean {total / 2:g}", font_weight="bold")
    return 220, picture


def least_squares():
    """Draw the outputs before the cut, after it, and after the remaining weight was solved for."""
    whole = [WEIGHT_A * a + WEIGHT_B * b for a, b in zip(A, B, strict=True)]
    solved = WEIGHT_A + WEIGHT_B * sum(a * b for a, b in zip(A, B, strict=True)) / sum(a * a for a in A)
    rows = (("both neurons", whole, HEAD), ("cut: a alone, weight 1", [WEIGHT_A * a for a in A], GONE),
            (f"solved: a alone, weight {solved:g}", [solved * a for a in A], NEURON))
    picture = ""
    for place, (title, values, colour) in enumerate(rows):
        x = 20 + 205 * place
        error = sum((value - other) ** 2 for value, other in zip(values, whole, strict=True))
        picture += words(x, 18, title, font_size=13) + line(f"M{x} 150H{x + 175}", 1.2)
        for token, (value, target) in enumerate(zip(values, whole, strict=True)):
            at = x + 12 + 56 * token
            picture += rect(at, 150 - 9 * value, 34, 9 * value, colour) + middle(at + 17, 145 - 9 * value, f"{value:g}")
            picture += line(f"M{at - 4} {150 - 9 * target}H{at + 38}", 1.5, stroke_dasharray="4 3")
            picture += middle(at + 17, 166, f"token {token + 1}", font_size=10)
        picture += words(x, 190, f"squared error {error:g}", font_size=13)
    return 200, picture


def block_removal():
    """Draw a residual network whose second block is removed: the shortcut carries its input on."""
    picture = ""
    for y, gone in ((60, None), (170, 1)):
        picture += words(8, y - 36, "before" if gone is None else "block 2 removed: the next block reads x itself")
        picture += arrow(20, y, 620, y, 2)
        for place in range(4):
            x = 90 + 130 * place
            if place == gone:
                picture += rect(x, y - 24, 60, 22, "none", stroke=GONE, stroke_dasharray="4 3")
                picture += cross(x + 30, y - 13, 10)
            else:
                picture += line(f"M{x - 18} {y}V{y - 13}H{x}", 1.5) + rect(x, y - 24, 60, 22, HEAD)
                picture += middle(x + 30, y - 8, f"f{place + 1}", fill="#fff")
                picture += arrow(x + 60, y - 13, x + 80, y - 13) + middle(x + 86, y + 18, "+ f", font_size=11)
                picture += line(f"M{x + 80} {y - 13}V{y}", 1.5)
        picture += words(20, y + 18, "x", font_style="italic")
    return 200, picture


def votes():
    """Draw the ranks of four blocks as stacked votes of three metrics; the lowest sum is removed."""
    picture, lowest = "", min(VOTES, key=lambda name: sum(VOTES[name]))
    for row, (name, ranks) in enumerate(VOTES.items()):
        y, x = 22 + 42 * row, 70
        picture += words(8, y + 15, f"block {name}")
        for colour, rank in zip(methods.METRICS, ranks, strict=True):
            picture += rect(x, y, 44 * rank, 22, colour, stroke="currentColor", stroke_width=0.5) if rank else ""
            dark = "#fff" if colour == methods.METRICS[-1] else "#000"
            picture += middle(x + 22 * rank, y + 16, rank, fill=dark) if rank else ""
            x += 44 * rank
        picture += words(x + 8, y + 16, f"sum {sum(ranks)}" + (": removed" if name == lowest else ""),
                         font_weight="bold")
    for place, metric in enumerate(("metric 1", "metric 2", "metric 3")):
        picture += rect(70 + 110 * place, 192, 12, 12, methods.METRICS[place]) + words(88 + 110 * place, 203, metric)
    return 212, picture


def forgiving():
    """Draw one triangle turned and one scaled, with the metrics that see each change."""
    shape = ((0, -24), (26, 20), (-26, 20))
    changes = (("first", lambda x, y: (x, y), ("", "")),
               ("turned", lambda x, y: (-y, x), ("CKA: 0, nothing moved", "permutation: moved")),
               ("doubled", lambda x, y: (1.7 * x, 1.7 * y), ("CKA: 0, nothing moved", "gaussian 2: moved")),
               ("sheared", lambda x, y: (x + 0.9 * y, y), ("linear shape 0: 0", "CKA: moved")))
    picture = ""
    for place, (name, change, said) in enumerate(changes):
        x, points = 75 + 165 * place, [change(*point) for point in shape]
        path = "".join(f"{'M' if n == 0 else 'L'}{x + dx:.1f} {75 + dy:.1f}" for n, (dx, dy) in enumerate(points)) + "Z"
        picture += line(path, 1.2, opacity=0.5) + middle(x, 20, name, font_weight="bold")
        for (dx, dy), mark in zip(points, "123", strict=True):
            picture += f'<circle cx="{x + dx:.1f}" cy="{75 + dy:.1f}" r="8" fill="{HEAD}"/>'
            picture += middle(x + dx, 79 + dy, mark, fill="#fff", font_size=11)
        picture += middle(x, 140, said[0], font_size=12) + middle(x, 158, said[1], font_size=12)
    return 166, picture


def norms():
    """Draw what two heads add, feature by feature, with both norms and the head that each norm removes."""
    sizes = {name: (sum(map(abs, added)), sum(v * v for v in added) ** 0.5) for name, added in ADDED.items()}
    picture = ""
    for place, (name, added) in enumerate(ADDED.items()):
        x = 20 + 320 * place
        picture += words(x, 18, name, font_weight="bold") + line(f"M{x} 120H{x + 150}", 1.2)
        for feature, value in enumerate(added):
            at = x + 8 + 36 * feature
            picture += rect(at, 120 - 30 * value, 24, 30 * value, HEAD) if value else ""
            picture += middle(at + 12, 136, value, font_size=12)
        for row, norm in enumerate(("L1", "L2")):
            least = min(sizes, key=lambda one, row=row: sizes[one][row]) == name
            picture += words(x + 165, 60 + 30 * row, f"{norm} {sizes[name][row]:g}" + (": removed" if least else ""))
    return 146, picture


def bures():
    """Draw pairs of ellipses with the squares of their Bures distances, which have the same axes."""
    picture = ""
    for place, (name, (one, other)) in enumerate(SHAPES.items()):
        x = 150 + 330 * place
        for (a, b), look in ((one, {"stroke": HEAD}), (other, {"stroke": NEURON, "stroke_dasharray": "6 4"})):
            extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in look.items())
            picture += f'<ellipse cx="{x}" cy="85" rx="{32 * a}" ry="{32 * b}" fill="none" stroke-width="2.5"{extra}/>'
        square = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
        picture += middle(x, 176, f"{name}: squared distance {square:g}")
    return 186, picture


def timeline():
    """Draw the steps of the history on a line of years."""
    picture = line("M20 100H620", 2)
    for place, (year, text) in enumerate(STEPS):
        x, up = 52 + 76 * place, place % 2 == 0
        y = 62 if up else 128
        picture += f'<circle cx="{x}" cy="100" r="5" fill="{HEAD}"/>'
        picture += line(f"M{x} {95 if up else 105}V{y + (6 if up else -6)}")
        picture += middle(x, y - 16 if up else y + 26, year, font_weight="bold", font_size=13)
        picture += middle(x, y if up else y + 10, text, font_size=11)
    return 165, picture


CONCEPTS = {
    "norms": (norms, "Two heads: one adds 3 to one feature, the other 1 to each of four; L1 removes A, L2 removes B"),
    "bures": (bures, "Two pairs of ellipses; the squares of their distances are 5 and 2"),
    "timeline": (timeline, "Eight steps in the history of pruning, from 1988 to 2024, on a line of years"),
    "head_adds": (head_adds, "Vectors that two heads add for two tokens, their sizes and the means 3 and 1.5"),
    "least_squares": (least_squares, "Outputs for three tokens before the cut, after it, and with a solved weight"),
    "block_removal": (block_removal, "Four residual blocks; without the second one its input goes to the third"),
    "votes": (votes, "Ranks of four blocks by three metrics, stacked; block b has the lowest sum"),
    "forgiving": (forgiving, "Three points turned, doubled and sheared, with metrics that see the change or not")}


def draw(name):
    """Return the SVG of a concept."""
    picture, title = CONCEPTS[name]
    height, body = picture()
    return (f'<svg class="concept" viewBox="0 0 640 {height}" role="img" aria-label="{title}" font-size="14" '
            f'fill="currentColor">{body}</svg>\n')


if __name__ == "__main__":
    for name in CONCEPTS:
        (HERE / f"{name}.svg").write_text(draw(name))
