"""Figures of stored models: perplexity against size or time, one line per model, a marker per format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pruning_lib.evaluation import storage_rule
from pruning_lib.report.number_style import log_ticks, spaced

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# whole model first, then by removed fraction; a line of its own for readers who see no colours
COLOURS = ("#000000", "#56B4E9", "#0072B2", "#882255", "#D55E00")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = {"f32": "8", "bf16": "h", "f16": "o", "q8_0": "s", "q6_k": "^", "q5_k_m": "v", "q4_k_m": "D"}


def front(table: pd.DataFrame, ax: Axes, *, cost: str, label: str) -> Axes:
    """Draw ``perplexity`` against the column ``cost``, both logarithmic, and the Pareto front as a grey band.

    ``table`` has a line per file with columns ``wanted_fraction``, ``format``, ``perplexity`` and ``cost``; less is
    better in both.
    """
    best = table[storage_rule.front(table[cost].to_numpy(), table.perplexity.to_numpy())].sort_values(cost)
    ax.plot(best[cost], best.perplexity, color="#cccccc", lw=9, solid_capstyle="round", zorder=0)
    for colour, line, (fraction, files) in zip(COLOURS, LINES, table.groupby("wanted_fraction"), strict=False):
        files = files.sort_values(cost)
        ax.plot(files[cost], files.perplexity, color=colour, lw=1.4, linestyle=line,
                label=spaced(f"{fraction:.0%} removed") if fraction else "whole model")
        for kind, lines in files.groupby("format"):
            ax.plot(lines[cost], lines.perplexity, MARKERS[str(kind)], color=colour, ms=7, linestyle="none")
    for kind in [name for name in MARKERS if name in set(table.format)]:
        ax.plot([np.nan], [np.nan], MARKERS[kind], color="#777777", linestyle="none", label=kind.upper())
    ax.margins(0.08)
    log_ticks(ax, "y", leading=(1, 2, 3, 5))
    log_ticks(ax, "x", leading=(1, 1.5, 2, 3, 5, 7))
    ax.set(xlabel=label, ylabel="perplexity")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
