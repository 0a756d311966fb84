"""Figure of the README from the records: perplexity against size, a line per method."""

import os
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("PRUNING_RESULTS", str(ROOT / "data" / "results"))

from pruning_lib.experiments import records
from pruning_lib.report import plots  # noqa: E402  (the records' folder has to be known first)

runs = records.to_dataframe("amp_prune")
with plots.style():
    fig, ax = plt.subplots(figsize=(7, 4))
    plots.quality_against_size(runs[runs.heads_removed != "same_share"], ax, quality="perplexity")
    ax.set_yscale("log")
    ax.set_ylabel("perplexity on WikiText-2 (log scale)")
    fig.savefig(ROOT / "book" / "_static" / "amp_against_size.png", dpi=110, bbox_inches="tight")
