"""Figures of the book: one function per kind, which draws a table or an array on an axis and returns the axis."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from pruning_lib._extras import extra
from pruning_lib.report.number_style import log_ticks, percent, space_all, spaced
from pruning_lib.report.series import few_series

with extra("report"):
    import matplotlib as mpl
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator


class _Looks(dict):
    """Colour or marker (or both) of names; a name without an entry gets one of the spare looks, always the same."""

    def __init__(self, spare: Sequence[Any], looks: dict[str, Any]) -> None:
        super().__init__(looks)
        self.spare = spare

    def __missing__(self, name: str) -> Any:
        return self.spare[zlib.crc32(name.encode()) % len(self.spare)]

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return the names in the order of the entries, names without an entry last."""
        places = {name: place for place, name in enumerate(self)}
        return sorted(set(names), key=lambda name: (places.get(name, len(places)), name))


SPARE_COLOURS = ("#44AA99", "#AA4499", "#999933", "#6699CC", "#661100", "#DDCC77", "#88CCEE")
SPARE_MARKERS = ("<", ">", "h", "8", "H")
# Okabe and Ito's colours, safe for colour-blind readers; one per method, the same in every figure
COLOUR = _Looks(SPARE_COLOURS, {
    "dense": "#000000", "amp": "#0072B2", "random": "#999999", "highest": "#D55E00", "magnitude": "#E69F00",
    "activation_norm": "#56B4E9", "wanda": "#009E73", "flap": "#CC79A7", "taylor": "#F0E442",
    "reconstruction_error": "#882255", "peak_to_peak": "#44AA99"})
MARKER = _Looks(SPARE_MARKERS, {
    "dense": "*", "amp": "o", "random": "s", "highest": "^", "magnitude": "D", "activation_norm": "v", "wanda": "P",
    "flap": "X", "taylor": "d", "reconstruction_error": "p", "peak_to_peak": "<"})
# colour and marker of criteria that rank blocks; variants of one metric share a colour and differ in LINE
CRITERION = _Looks([(colour, marker) for colour in SPARE_COLOURS for marker in SPARE_MARKERS], {
    "none": ("#000000", "*"), "consensus": ("#0072B2", "o"), "random": ("#999999", "s"),
    "front_to_back": ("#D55E00", "^"), "loss": ("#332288", "h"), "block_influence": ("#117733", "p"),
    "cka": ("#009E73", "v"), "gaussian_0": ("#CC79A7", "<"), "gaussian_1": ("#CC79A7", ">"),
    "gaussian_2": ("#CC79A7", "x"), "linear_shape_0": ("#E69F00", "d"), "linear_shape_1": ("#E69F00", "D"),
    "permutation": ("#56B4E9", "P"), "wasserstein": ("#882255", "X")})
LINE = {"gaussian_1": "--", "gaussian_2": ":", "linear_shape_1": "--"}  # of criteria; solid elsewhere


@contextmanager
def style() -> Iterator[None]:
    """Set the fonts and sizes of the book, legible at phone width; use as ``with plots.style():``."""
    with extra("report"):
        import matplotlib.pyplot as plt
    with mpl.rc_context({
        "figure.figsize": (6.0, 3.8), "figure.dpi": 110, "savefig.bbox": "tight", "font.size": 12,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "legend.frameon": False, "figure.constrained_layout.use": True, "figure.facecolor": "white",
    }):
        yield
        for number in plt.get_fignums():
            space_all(plt.figure(number))
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # the first figure of a notebook enables interactive mode; keep it


def importance_map(scores: Tensor, ax: Axes, *, parts: str) -> Axes:
    """Draw a heat map of importances (L, parts), each row relative to the mean of its block.

    Above 64 parts (neurons, which have no natural order) a row is sorted from least to most important; heads keep their
    order.
    """
    share = (scores / scores.mean(1, keepdim=True)).numpy()
    many = share.shape[1] > 64
    image = np.sort(share, axis=1) if many else share
    drawn = ax.imshow(image, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=np.quantile(image, 0.98),
                      interpolation="nearest")
    ax.figure.colorbar(drawn, ax=ax, label="share of the block's mean")
    ax.grid(False)
    ax.set(xlabel=f"{parts}, sorted" if many else parts, ylabel="block")
    return ax


def quality_against_size(table: pd.DataFrame, ax: Axes, *, quality: str, low: str = "", high: str = "") -> Axes:
    """Draw ``quality`` against the fraction removed, one line per method, with seeds as a band and intervals as bars.

    ``table`` has columns ``method``, ``removed_fraction``, ``quality`` and, for bars, ``low`` and ``high``.
    """
    dense = table[table.method == "dense"]
    for method in COLOUR.ordered(set(table.method) - {"dense"}):
        rows = pd.concat([dense.head(1), table[table.method == method]])
        by_size = rows.groupby("removed_fraction")[quality]
        mean = by_size.mean()
        ax.plot(mean.index, mean, marker=MARKER[method], color=COLOUR[method], label=method.replace("_", " "))
        ax.fill_between(mean.index, by_size.min(), by_size.max(), color=COLOUR[method], alpha=0.2, linewidth=0)
        if low:
            error = [rows[quality] - rows[low], rows[high] - rows[quality]]
            ax.errorbar(rows.removed_fraction, rows[quality], yerr=error, color=COLOUR[method], fmt="none", capsize=3)
    ax.plot(dense.removed_fraction, dense[quality], MARKER["dense"], color=COLOUR["dense"], ms=12, label="dense",
            linestyle="none")
    ax.set(xlabel="parameters removed", ylabel=quality.replace("_", " "))
    percent(ax, "x")
    if quality == "accuracy":
        percent(ax, "y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # above the axes, to leave the lines visible
    return ax


def bars(table: pd.DataFrame, ax: Axes, *, quality: str, label: str = "") -> Axes:
    """Draw a horizontal bar per line of ``table`` (``label``, ``method`` and ``quality``), first line on top."""
    rows = table.iloc[::-1]
    ax.barh(range(len(rows)), rows[quality], color=[COLOUR[m] for m in rows.method], tick_label=rows["label"].tolist())
    for place, value in enumerate(rows[quality]):
        ax.text(value, place, f" {value:,.1f}" if value < 1000 else f" {value:,.0f}", va="center")
    ax.set(xlabel=label or quality.replace("_", " "))
    ax.margins(x=0.18)
    ax.grid(axis="y", visible=False)
    return ax


def draws(table: pd.DataFrame, ax: Axes, *, quality: str, label: str = "") -> Axes:
    """Draw a point per line of ``table``, a row per method, and a bar at each method's mean; logarithmic.

    ``table`` has columns ``method`` and ``quality``.
    """
    places = {method: -i for i, method in enumerate(dict.fromkeys(table.method))}
    for method, place in places.items():
        values = table[table.method == method][quality]
        ax.plot(values, [place] * len(values), MARKER[method], color=COLOUR[method], alpha=0.6, linestyle="none")
        ax.plot(values.mean(), place, "|", color=COLOUR[method], ms=18, mew=2)
    ax.set_yticks(list(places.values()), [method.replace("_", " ") for method in places])
    ax.margins(x=0.08, y=0.1)
    log_ticks(ax, leading=(1, 2, 3, 5))
    ax.set(xlabel=label or quality.replace("_", " "))
    ax.grid(axis="y", visible=False)
    return ax


def forest(table: pd.DataFrame, ax: Axes, *, quality: str) -> Axes:
    """Draw a point with its interval per line of ``table``, first line on top; colour and marker per ``kind``.

    ``table`` has columns ``label``, ``kind``, ``quality``, ``low`` and ``high``; lines of one label share a position.
    """
    places = {label: -i for i, label in enumerate(dict.fromkeys(table.label))}
    for kind, colour, marker in zip(dict.fromkeys(table.kind), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "osD^",
                                    strict=False):
        rows = table[table.kind == kind]
        error = [rows[quality] - rows.low, rows.high - rows[quality]]
        ax.errorbar(rows[quality], rows.label.map(places), xerr=error, fmt=marker, color=colour, capsize=4, label=kind)
    ax.set_yticks(list(places.values()), list(map(spaced, places)))
    ax.set(xlabel=quality.replace("_", " "))
    ax.grid(axis="y", visible=False)
    ax.margins(y=0.1)
    if len(table):
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def accuracies(table: pd.DataFrame, ax: Axes, *, method: str) -> Axes:
    """Draw a point with its interval per task; columns ``task``, ``accuracy``, ``low``, ``high``, ``chance``."""
    rows = table.iloc[::-1]
    error = [rows.accuracy - rows.low, rows.high - rows.accuracy]
    ax.errorbar(rows.accuracy, rows.task, xerr=error, fmt=MARKER[method], color=COLOUR[method], capsize=4, label=method)
    ax.plot(rows.chance, rows.task, "|", color="#777777", ms=18, mew=2, label="chance")
    ax.set(xlabel="accuracy", xlim=(0, 1))
    percent(ax, "x")
    ax.grid(axis="y", visible=False)
    ax.margins(y=0.12)
    ax.legend(loc="lower right")
    return ax


def criteria_against_size(table: pd.DataFrame, ax: Axes, *, quality: str) -> Axes:
    """Draw ``quality`` against blocks removed, one line per criterion: mean over seeds, and seeds as a band.

    ``table`` has columns ``criterion``, ``removed`` and ``quality``.  Of more than six criteria, those of Consensus'
    single metrics become one line with a band over all of them, and so do the other rankings if it has to be.
    """
    table = few_series(table)
    for criterion in CRITERION.ordered(table.criterion):
        colour, marker = CRITERION[criterion]
        seeds = table[table.criterion == criterion].groupby("removed")[quality]
        mean = seeds.mean()
        ax.plot(mean.index, mean, LINE.get(criterion, "-"), marker=marker, ms=5, color=colour,
                label=criterion.replace("_", " "))
        ax.fill_between(mean.index, seeds.min(), seeds.max(), color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel="blocks removed", ylabel=quality.replace("_", " "))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "fraction" in quality or "accuracy" in quality:
        percent(ax, "y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def rank_map(ranks: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a heat map of ranks, a row per block and a column per metric; dark blocks are removed first."""
    drawn = ax.imshow(ranks.to_numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    ax.figure.colorbar(drawn, ax=ax, label="rank (0 goes first)")
    ax.grid(False)
    ax.set_xticks(range(ranks.shape[1]), ranks.columns, rotation=45, ha="right")
    ax.set_yticks(range(len(ranks)), ranks.index, fontsize=min(12, 320 / len(ranks)))
    ax.set(ylabel="block left out")
    return ax


def agreement(correlations: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a heat map of a square table of rank correlations with the values as text."""
    drawn = ax.imshow(correlations.to_numpy(), cmap="RdBu", vmin=-1, vmax=1)
    ax.figure.colorbar(drawn, ax=ax, label="rank correlation (Spearman)")
    _numbers(correlations, ax, light=lambda value: abs(value) > 0.6)
    return ax


def distance_map(shares: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a heat map of relative distances, a row per metric and a column per change, with the values as text."""
    drawn = ax.imshow(shares.to_numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    ax.figure.colorbar(drawn, ax=ax, label="distance / distance to an unrelated cloud")
    _numbers(shares, ax, light=lambda value: value < 0.6)
    return ax


def _numbers(table: pd.DataFrame, ax: Axes, *, light: Callable[[float], bool]) -> None:
    """Write names and values into a heat map; ``light`` returns True for values on a dark field."""
    ax.grid(False)
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=45, ha="right")
    ax.set_yticks(range(len(table)), table.index)
    for i, row in enumerate(table.to_numpy()):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9,
                    color="white" if light(value) else "black")


def cloud(points: Tensor, labels: Tensor, ax: Axes, *, label: str) -> Axes:
    """Draw points (N, 2) of a plane, coloured by class."""
    colours = list(COLOUR.values())[1:]
    for place, name in enumerate(labels.unique().tolist()):
        across, up = points[labels == name].T.numpy()
        ax.scatter(across, up, s=8, color=colours[place % len(colours)])
    ax.set(xlabel=label, aspect="equal")
    return ax


def rounds(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw accuracy against blocks removed: after the cut, after batch-norm recalibration, and after tuning.

    ``table`` has ``removed_blocks``, ``cut_fraction``, ``recalibrated_fraction``, ``accuracy_fraction`` with
    ``accuracy_low`` and ``accuracy_high``; the first line has no cut.
    """
    stages = (("accuracy_fraction", "o-", "#0072B2", "tuned"), ("recalibrated_fraction", "s--", "#E69F00",
              "cut, batch norms measured anew"), ("cut_fraction", "^:", "#D55E00", "cut"))
    for column, line, colour, label in stages:
        ax.plot(table.removed_blocks, table[column], line, color=colour, label=label)
    ax.fill_between(table.removed_blocks, table.accuracy_low, table.accuracy_high, color="#0072B2", alpha=0.2,
                    linewidth=0)
    ax.set(xlabel="blocks removed", ylabel="accuracy")
    percent(ax, "y")
    ax.legend(loc="lower left")
    return ax


def losses(values: Sequence[float], ax: Axes, *, steps: int = 25) -> Axes:
    """Draw the loss of each step and its mean over the last ``steps``; ``values`` in nats per token."""
    mean = pd.Series(values, dtype=float).rolling(steps, min_periods=1).mean()
    ax.plot(range(1, len(values) + 1), values, color="#56B4E9", alpha=0.5, linewidth=1, label="single step")
    ax.plot(range(1, len(values) + 1), mean, color="#0072B2", label=f"mean of {steps} steps")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.legend()
    return ax


def time_against_macs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw relative time against relative multiply-adds (dense network = 1), with the line of equality.

    ``table`` has ``macs``, ``latency_s`` and its quartiles ``latency_low_s`` and ``latency_high_s``; its first line is
    the dense network.
    """
    macs, whole = table.macs / table.macs.iloc[0], table.latency_s.iloc[0]
    error = [(table.latency_s - table.latency_low_s) / whole, (table.latency_high_s - table.latency_s) / whole]
    ax.plot([0, 1], [0, 1], "--", color="#777777", label="time falls with the multiply-adds")
    ax.errorbar(macs, table.latency_s / whole, yerr=error, fmt="o-", color="#0072B2", ms=5, capsize=3, label="measured")
    ax.set(xlabel="multiply-adds left", ylabel="time left", xlim=(0, 1.05), ylim=(0, None))
    percent(ax, "x")
    percent(ax, "y")
    ax.legend(loc="upper left")
    return ax


def budgets(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw accuracy against the budget of an attack with intervals, one line per network.

    ``table`` has ``label``, ``criterion``, ``strength`` (numbers or numeric text), ``accuracy_fraction``,
    ``accuracy_low`` and ``accuracy_high``.
    """
    lines = ("-", "--", ":", "-.")
    for label, rows in table.groupby("label", sort=False):
        rows = rows.assign(budget=rows.strength.astype(float)).sort_values("budget")
        colour, marker = CRITERION[rows.criterion.iloc[0]]
        line = lines[list(table[table.criterion == rows.criterion.iloc[0]].label.unique()).index(label) % len(lines)]
        ax.plot(rows.budget, rows.accuracy_fraction, line, marker=marker, color=colour, label=label)
        ax.fill_between(rows.budget, rows.accuracy_low, rows.accuracy_high, color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel="budget", ylabel="accuracy", ylim=(-0.02, 1.02))
    percent(ax, "y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def points(table: pd.DataFrame, ax: Axes, *, quality: str, unit: str = "fraction") -> Axes:
    """Draw a point with its interval per line of ``table``: ``label``, ``<quality>_<unit>``, and the ends.

    The ends are ``<quality>_low`` and ``_high``, or ``<quality>_<unit>_low`` and ``_high`` if these columns exist.
    """
    rows, middle = table.iloc[::-1], f"{quality}_{unit}"
    ends = middle if f"{middle}_low" in rows else quality
    error = [rows[middle] - rows[f"{ends}_low"], rows[f"{ends}_high"] - rows[middle]]
    ax.errorbar(rows[middle].to_numpy(float), rows.label.map(spaced), xerr=np.array(error, float), fmt="o",
                color="#0072B2", capsize=4)
    ax.set(xlabel=quality if unit == "fraction" else f"{quality} ({unit})")
    if unit == "fraction":
        percent(ax, "x")
    ax.margins(x=0.1, y=0.25)
    ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    ax.grid(axis="y", visible=False)
    return ax


def gains(table: pd.DataFrame, ax: Axes, *, task: str) -> Axes:
    """Draw the speedup with its interval per line of ``table``, and a bar at its upper bound.

    ``table`` has ``label``, ``<task>_gain``, ``<task>_gain_low``, ``<task>_gain_high`` and ``<task>_ideal``.
    """
    rows, gain = table.iloc[::-1], f"{task}_gain"
    error = [rows[gain] - rows[f"{gain}_low"], rows[f"{gain}_high"] - rows[gain]]
    ax.axvline(1, color="#777777", linewidth=1)
    ax.errorbar(rows[gain], rows.label.map(spaced), xerr=np.array(error, float), fmt="o", color="#0072B2", capsize=4,
                label="measured")
    ax.plot(rows[f"{task}_ideal"], rows.label.map(spaced), "|", color="#D55E00", ms=14, mew=3, label="ideal")
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1, y=0.1)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax
