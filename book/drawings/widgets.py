"""Three figures to play with: perplexity by removed fraction, a cloud under eight metrics, ranks as votes.

Each is complete without a script: a picture or a table of one state, with numbers of the records or of the library.
``_static/widgets.js`` makes it move.  The page is built from the records of the day, so the figures are drawn then.
"""

import json
import math
import random

import pandas as pd
import torch

from pruning_lib.experiments import records
from pruning_lib.pruning import consensus, similarity

FRACTIONS = (0, 10, 20, 30)  # percent of all parameters
WAYS = {  # way to remove -> percent -> (run, method in its rows); "" for a record of one model
    "AMP, neurons only, reconstructed": {20: ("recipe-amp-sequential-20", ""),
                                         30: ("recipe-amp-sequential-30-neurons", "")},
    "AMP, neurons only": {10: ("amp-10", "amp"), 20: ("amp-20", "amp"), 30: ("recipe-amp-30-neurons", "")},
    "AMP, heads and neurons": {10: ("amp-same-share-10", "amp"), 20: ("amp-same-share-20", "amp"),
                               30: ("amp-same-share-30", "amp")},
    "random parts": {10: ("amp-10", "random"), 20: ("amp-20", "random"), 30: ("amp-30", "random")},
    "largest AMP score first": {10: ("amp-10", "highest"), 20: ("amp-20", "highest"), 30: ("amp-30", "highest")}}
ABOUT = {"cka": "which images are alike", "gaussian_0": "shapes of the classes", "gaussian_1": "places and shapes",
         "gaussian_2": "places of the classes", "permutation": "features, renamed", "linear_shape_0": "information",
         "linear_shape_1": "the cloud of images", "wasserstein": "values that occur"}
VOTES = {"a": (0.10, 7, 0.5), "b": (0.30, 2, 0.4), "c": (0.20, 4, 0.9), "d": (0.90, 9, 0.8)}  # of the chapter
WIDE, UNIT = 340, 24  # pixels of the drawing, and of one unit of a feature


def measured(run, method):
    """Return the perplexities in a record, one for each model of the method; none if there is no such record."""
    try:
        record = records.read(run)
    except ValueError:
        return []
    return [row["perplexity"] for row in record["rows"] if row.get("method") == method] if method else [
        record["values"]["perplexity"]]


def perplexities():
    """Return way -> percent -> perplexities of all draws."""
    dense = measured("recipe-dense", "")
    return {way: {percent: measured(*runs[percent]) if percent in runs else [] if percent else dense
                  for percent in FRACTIONS} for way, runs in WAYS.items()}


def number(value):
    """Return a perplexity or a distance as text of about three digits."""
    if value >= 1e6:
        return f"{value / 1e6:.1f} million"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


def shown(values):
    """Return the mean of the draws as text, and their range if there are several."""
    if not values:
        return "not measured"
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(sum(values) / len(values)) + spread


def perplexity():
    found = perplexities()
    head = "".join(f'<th scope="col">{percent} %</th>' for percent in FRACTIONS)
    body = "".join(f'<tr><th scope="row">{way}</th>' + "".join(f"<td>{shown(values[p])}</td>" for p in FRACTIONS)
                   + "</tr>" for way, values in found.items())
    data = json.dumps({"percent": FRACTIONS, "ways": {way: [sum(v) / len(v) if v else None for v in values.values()]
                                                      for way, values in found.items()}})
    return f"""<div class="widget" data-widget="perplexity">
<div class="controls"><label>Parameters removed <input type="range" min="0" max="{len(FRACTIONS) - 1}" step="1" \
value="2"><output>20 %</output></label></div>
<div class="bars" aria-live="polite"></div>
<div class="table"><table><caption>Perplexity by fraction of all parameters removed</caption>
<thead><tr><th scope="col">what was removed</th>{head}</tr></thead><tbody>{body}</tbody></table></div>
<script type="application/json">{data}</script></div>
"""


# --- the cloud --------------------------------------------------------------------------------------------------------


def points(seed=1, each=5):
    """Return the cloud, an unrelated one, and the class of every point."""
    draw = random.Random(seed)
    labels = [n % 3 for n in range(3 * each)]
    places, spread = ((2.6, 0.4), (-0.4, 2.4), (-1.8, -1.4)), ((1.0, 0.4), (0.4, 0.9), (0.7, 0.6))
    cloud = [[round(places[c][k] + draw.gauss(0, spread[c][k]), 1) for k in (0, 1)] for c in labels]
    return cloud, [[round(draw.gauss(0, 2), 1) for _ in range(2)] for _ in labels], labels


def turned(cloud, degrees=30):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[c * x - s * y, s * x + c * y] for x, y in cloud]


def distances(x, y, labels):
    """Return the distances of the library between two lists of points."""
    one, other = (torch.tensor(cloud, dtype=torch.float64) for cloud in (x, y))
    return {name: values.item() for name, values in similarity.distances(one, [other], torch.tensor(labels)).items()}


def mark(point, label, kind):
    """Return the mark of a point: circle, square or triangle by its class."""
    x, y, r = WIDE / 2 + UNIT * point[0], WIDE / 2 - UNIT * point[1], 6
    path = (f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0", f"M{-r} {-r}H{r}V{r}H{-r}Z",
            f"M0 {-r - 1}L{r + 1} {r}H{-r - 1}Z")[label]
    return f'<path class="{kind} class-{label}" transform="translate({x:.1f} {y:.1f})" d="{path}"/>'


def cloud():
    x, unrelated, labels = points()
    y = turned(x)
    far, here = distances(x, unrelated, labels), distances(x, y, labels)
    links = "".join(f'<path class="link" d="M{WIDE / 2 + UNIT * a:.1f} {WIDE / 2 - UNIT * b:.1f}'
                    f'L{WIDE / 2 + UNIT * c:.1f} {WIDE / 2 - UNIT * d:.1f}"/>'
                    for (a, b), (c, d) in zip(x, y, strict=True))
    marks = "".join(mark(point, label, kind) for kind, points_ in (("first", x), ("moved", y))
                    for point, label in zip(points_, labels, strict=True))
    lines = "".join(
        f'<tr data-metric="{name}"><th scope="row"><code>{name}</code> {ABOUT[name]}</th><td>{number(value)}</td>'
        f'<td class="share"><span style="width:{min(1, value / far[name]) * 100:.0f}%"></span></td></tr>'
        for name, value in here.items())
    buttons = "".join(f'<button type="button" data-change="{key}">{text}</button>' for key, text in (
        ("turn", "turn by 30°"), ("double", "double"), ("shift", "shift"), ("stretch", "stretch"),
        ("rename", "swap the features"), ("shuffle", "swap two images"), ("reset", "undo all")))
    data = json.dumps({"x": x, "y": y, "far": far, "labels": labels, "wide": WIDE, "unit": UNIT})
    return f"""<div class="widget" data-widget="cloud">
<div class="controls">{buttons}
<label>Drag <select><option value="point">one point</option><option value="class">its class</option>\
<option value="all">all points</option></select></label></div>
<div class="beside"><svg viewBox="0 0 {WIDE} {WIDE}" role="img" aria-label="Fifteen points of three classes, hollow, \
and the same points after a change, filled">{links}{marks}</svg>
<div class="table"><table><caption>Distance between the two clouds; the bar is full where it is as large as to an \
unrelated cloud</caption>
<thead><tr><th scope="col">metric</th><th scope="col">distance</th><th scope="col">share</th></tr></thead>
<tbody>{lines}</tbody></table></div></div>
<p class="said" aria-live="polite">Turned by 30°.</p>
<script type="application/json">{data}</script></div>
"""


# --- votes ------------------------------------------------------------------------------------------------------------


def votes():
    table = pd.DataFrame(VOTES, index=["metric 1", "metric 2", "metric 3"]).T
    ranks, first = consensus.ranks(table), consensus.rank(table)[0]
    head = "".join(f'<th scope="col">{name}</th>' for name in table)
    body = "".join(f'<tr><th scope="row">{block}</th>' + "".join(
        f'<td><span class="value">{value:g}</span> <span class="rank">{rank:g}</span></td>'
        for value, rank in zip(table.loc[block], ranks.loc[block], strict=True))
        + f'<td class="sum">{ranks.loc[block].sum():g}</td></tr>' for block in table.index)
    return f"""<div class="widget" data-widget="votes">
<div class="table"><table><caption>Distances, with their ranks in the shaded boxes</caption>
<thead><tr><th scope="col">block</th>{head}<th scope="col">sum of ranks</th></tr></thead>
<tbody>{body}</tbody></table></div>
<p class="said" aria-live="polite">Block {first} is removed first: its ranks add up to {ranks.loc[first].sum():g}.</p>
</div>
"""


WIDGETS = {"perplexity": perplexity, "cloud": cloud, "votes": votes}
