"""Drawing of grouped-query attention: which query head reads which key/value head, before and after three cuts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from methods import GONE, HEAD, NEURON, cross, line, rect, words

HERE = Path(__file__).parent
QUERIES, GROUPS = 6, 3


def pairs(queries, groups):
    """Return (query, key/value head) of every query, as attention code repeats keys for runs of queries."""
    return [(query, query * groups // queries) for query in range(queries)]


PANELS = (  # name, kept queries, kept key/value heads, words below
    ("Before", range(6), range(3), "Six queries, three key/value heads. Two neighbours share one."),
    ("A whole group goes", (0, 1, 4, 5), (0, 2), "Safe. The cache shrinks by a third."),
    ("One query of each group goes", (0, 3, 4), range(3), "Safe. The cache keeps its size."),
    ("Any two queries go", (0, 3, 4, 5), range(3), "Not possible: four queries do not divide among three keys."),
    ("Any three queries go", (0, 1, 3), range(3), "Wrong: query 1 now reads key b, and query 3 reads key c."),
)


def wrong(queries, keys):
    """Return the kept queries that attention would pair with another key than before; None if it cannot pair at all."""
    if len(queries) % len(keys):
        return None
    before = dict(pairs(QUERIES, GROUPS))
    return [queries[q] for q, k in pairs(len(queries), len(keys)) if keys[k] != before[queries[q]]]


def panel(queries, keys):
    """Return a panel: queries above, key/value heads below, a line per pair; wrong pairs are dashed."""
    queries, keys = list(queries), list(keys)
    bad, xs, ks = wrong(queries, keys), [10 + 20 * q for q in range(QUERIES)], [20 + 40 * k for k in range(GROUPS)]
    after = [] if bad is None else [(queries[q], keys[k]) for q, k in pairs(len(queries), len(keys))]
    picture = "".join(line(f"M{xs[q]} 34L{ks[k]} 76", 2, GONE if q in bad else "currentColor",
                           **({"stroke_dasharray": "3 3"} if q in bad else {})) for q, k in after)
    for q, x in enumerate(xs):
        picture += rect(x - 7, 20, 14, 14, HEAD if q in queries else "none", stroke=HEAD) + words(
            x, 14, q, text_anchor="middle", font_size=11)
        picture += "" if q in queries else cross(x, 27, 8)
    for k, x in enumerate(ks):
        picture += rect(x - 9, 76, 18, 14, NEURON if k in keys else "none", stroke=NEURON) + words(
            x, 103, "abc"[k], text_anchor="middle", font_size=11)
        picture += "" if k in keys else cross(x, 83, 8)
    return picture + (words(60, 60, "?", text_anchor="middle", font_size=26, fill=GONE) if bad is None else "")


def draw():
    """Return the figure as HTML."""
    items = "\n".join(
        f'<li><svg viewBox="0 0 120 110" aria-hidden="true" fill="currentColor">{panel(queries, keys)}</svg>'
        f'<div><strong>{name}</strong> <span>{text}</span></div></li>' for name, queries, keys, text in PANELS)
    return ('<figure class="method grouped" aria-label="Grouped-query attention before and after four cuts: two are '
            f'safe, one is impossible, one pairs queries with wrong keys">\n<ol>\n{items}\n</ol>\n</figure>\n')


if __name__ == "__main__":
    (HERE / "grouped_query.html").write_text(draw())
