"""The figure of stored models shows every file once, and the files that nothing beats."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pruning_lib.report import storage_plots

FILES = pd.DataFrame([(0.0, "f16", 270, 20.0), (0.0, "q4_k_m", 105, 22.0), (0.2, "f16", 230, 35.0),
                      (0.2, "q4_k_m", 90, 40.0)], columns=["wanted_fraction", "format", "megabytes", "perplexity"])


def test_every_file_is_a_point_and_the_front_joins_what_nothing_beats():
    fig, ax = plt.subplots()
    storage_plots.front(FILES, ax, cost="megabytes", label="size, MB")
    points = [tuple(xy) for line in ax.lines if line.get_linestyle() == "None" for xy in line.get_xydata()
              if not np.isnan(xy).any()]
    assert sorted(points) == sorted(FILES[["megabytes", "perplexity"]].itertuples(index=False, name=None))
    assert ax.lines[0].get_xydata().tolist() == [[90, 40], [105, 22], [270, 20]]  # the pruned float16 file is beaten
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["whole model", "20\u00a0% removed", "F16", "Q4_K_M"]
    assert ax.get_xlabel() == "size, MB" and ax.get_xscale() == ax.get_yscale() == "log"
    plt.close(fig)
