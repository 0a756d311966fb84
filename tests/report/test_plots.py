"""A plot draws its table on the given axis, one colour per method, with units and without a title."""

import os
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from pruning_lib.pruning.block_ranking import CRITERIA
from pruning_lib.pruning.importance import METHODS
from pruning_lib.report import plots, series

SIZES = pd.DataFrame(
    [("dense", 0.0, 10.0), ("amp", 0.1, 12.0), ("amp", 0.2, 20.0), ("random", 0.1, 30.0), ("random", 0.1, 50.0),
     ("random", 0.2, 100.0)], columns=["method", "removed_fraction", "perplexity"])
LABELLED = pd.DataFrame({"label": ["dense", "amp", "random"], "method": ["dense", "amp", "random"],
                         "latency_s": [10.0, 20.0, 1500.0]})
TASKS = pd.DataFrame({"task": ["piqa", "arc_easy"], "accuracy": [0.7, 0.4], "low": [0.6, 0.35], "high": [0.75, 0.5],
                      "chance": [0.5, 0.25]})

SEEDS = pd.DataFrame([("random", 0, 0.9), ("random", 1, 0.5), ("random", 1, 0.7), ("consensus", 0, 0.9),
                      ("consensus", 1, 0.8)], columns=["criterion", "removed", "cut_fraction"])
ROUNDS = pd.DataFrame({"removed_blocks": [0, 1], "cut_fraction": [None, 0.2], "recalibrated_fraction": [None, 0.5],
                       "accuracy_fraction": [0.9, 0.8], "accuracy_low": [0.8, 0.7], "accuracy_high": [1.0, 0.9]})
RANKS = pd.DataFrame({"cka": [1.0, 0.0, 2.0], "wasserstein": [0.0, 2.0, 1.0]}, index=["a", "b", "c"])
COSTS = pd.DataFrame({"macs": [200, 100], "latency_s": [4.0, 3.0], "latency_low_s": [3.8, 2.9],
                      "latency_high_s": [4.4, 3.2]})
BUDGETS = pd.DataFrame([("dense final", "none", "10", 0.2), ("dense final", "none", "0", 0.9),
                        ("a", "consensus", "0", 0.8), ("a", "consensus", "10", 0.3), ("b", "consensus", "0", 0.7)],
                       columns=["label", "criterion", "strength", "accuracy_fraction"])
BUDGETS["accuracy_low"], BUDGETS["accuracy_high"] = BUDGETS.accuracy_fraction - 0.1, BUDGETS.accuracy_fraction + 0.1
POINTS = pd.DataFrame({"label": ["dense", "a"], "reliance_fraction": [0.4, 0.1], "reliance_low": [0.3, -0.1],
                       "reliance_high": [0.6, 0.2], "energy_j": [4.0, 3.0], "energy_j_low": [3.0, 2.0],
                       "energy_j_high": [6.0, 3.5]})


@pytest.fixture
def ax():
    return Figure().add_subplot()


def lines(ax):
    """Return label -> (points, colour) of the lines of an axis."""
    return {line.get_label(): (line.get_xydata().tolist(), to_hex(line.get_color())) for line in ax.get_lines()}


def segments(ax):
    """Return the end points of every interval in the order of drawing."""
    return [[s.tolist() for s in bars[0].get_segments()] for _, _, bars in ax.containers]


@pytest.mark.parametrize("draw", [
    lambda ax: plots.importance_map(torch.rand(2, 3), ax, parts="head"),
    lambda ax: plots.quality_against_size(SIZES, ax, quality="perplexity"),
    lambda ax: plots.bars(LABELLED, ax, quality="latency_s"),
    lambda ax: plots.accuracies(TASKS, ax, method="amp"),
    lambda ax: plots.criteria_against_size(SEEDS, ax, quality="cut_fraction"),
    lambda ax: plots.rounds(ROUNDS, ax),
    lambda ax: plots.time_against_macs(COSTS, ax),
    lambda ax: plots.budgets(BUDGETS, ax),
    lambda ax: plots.points(POINTS, ax, quality="reliance")],
    ids=["importance_map", "quality_against_size", "bars", "accuracies", "criteria_against_size", "rounds",
         "time_against_macs", "budgets", "points"])
def test_a_plot_returns_the_axis_it_drew_on_with_labels_and_no_title(ax, draw):
    assert not ax.has_data() and draw(ax) is ax and ax.has_data()
    assert ax.get_xlabel() and ax.get_xlabel()[0].islower()
    assert not any(ax.get_title(where) for where in ("left", "center", "right")) and not ax.figure.get_suptitle()


def test_every_method_and_the_dense_model_have_a_colour_and_a_marker_of_their_own():
    names = {"dense", *METHODS}
    assert len({(plots.COLOUR[name], plots.MARKER[name]) for name in names}) == len(names)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_same_colour_in_every_figure(method):
    first, second, third = (Figure().add_subplot() for _ in range(3))
    plots.quality_against_size(SIZES.head(3).replace({"method": {"amp": method}}), first, quality="perplexity")
    plots.bars(LABELLED.tail(1).assign(method=method), second, quality="latency_s")
    plots.accuracies(TASKS, third, method=method)
    line, bar, points = first.get_lines()[0], second.patches[0], third.containers[0].lines[0]
    assert {to_rgba(line.get_color()), bar.get_facecolor(), to_rgba(points.get_color())} == {
        to_rgba(plots.COLOUR[method])}
    assert line.get_marker() == points.get_marker() == plots.MARKER[method]


def test_a_line_per_method_starts_at_the_dense_model_and_runs_through_the_means(ax):
    plots.quality_against_size(SIZES, ax, quality="perplexity")
    assert {label: points for label, (points, _) in lines(ax).items()} == {
        "amp": [[0, 10], [0.1, 12], [0.2, 20]], "random": [[0, 10], [0.1, 40], [0.2, 100]], "dense": [[0, 10]]}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("parameters removed", "perplexity")
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"dense", "amp", "random"}


def test_the_band_spans_the_seeds(ax):
    plots.quality_against_size(SIZES, ax, quality="perplexity")
    amp, random = ({tuple(point) for point in band.get_paths()[0].vertices} for band in ax.collections)
    assert random == {(0, 10), (0.1, 30), (0.1, 50), (0.2, 100)}
    assert amp == {(0, 10), (0.1, 12), (0.2, 20)}


def test_bars_are_the_intervals_of_the_table_for_each_model(ax):
    table = SIZES.assign(low=SIZES.perplexity - 1, high=SIZES.perplexity + 3)
    plots.quality_against_size(table, ax, quality="perplexity", low="low", high="high")
    amp, random = (np.array(s) for s in segments(ax))
    np.testing.assert_allclose(amp, [[[0, 9], [0, 13]], [[0.1, 11], [0.1, 15]], [[0.2, 19], [0.2, 23]]])
    assert [round(float(s[0, 1])) for s in random] == [9, 29, 49, 99]


def test_a_method_that_somebody_added_is_drawn_and_always_looks_the_same(ax):
    plots.quality_against_size(SIZES.replace({"method": {"amp": "mystery"}}), ax, quality="perplexity")
    assert [label for label in lines(ax)] == ["random", "mystery", "dense"]
    assert lines(ax)["mystery"][1] == plots.COLOUR["mystery"].lower() != lines(ax)["random"][1]


def test_the_first_line_of_the_table_is_the_bar_on_top_with_its_number(ax):
    plots.bars(LABELLED, ax, quality="latency_s", label="latency (s)")
    bars = sorted(ax.patches, key=lambda bar: -bar.get_y())
    assert [bar.get_width() for bar in bars] == [10, 20, 1500]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [plots.COLOUR[m].lower() for m in LABELLED.method]
    ax.figure.canvas.draw()
    names = {round(place): text.get_text() for place, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    assert [names[place] for place in (2, 1, 0)] == ["dense", "amp", "random"]
    numbers = sorted(((text.get_position()[1], text.get_text().strip()) for text in ax.texts), reverse=True)
    assert [text for _, text in numbers] == ["10.0", "20.0", "1,500"]
    assert ax.get_xlabel() == "latency (s)"


def test_two_models_of_the_same_name_have_a_bar_each(ax):
    plots.bars(LABELLED.assign(label="amp"), ax, quality="latency_s")
    assert len({bar.get_y() for bar in ax.patches}) == 3


def test_accuracies_show_each_task_with_its_interval_and_chance(ax):
    plots.accuracies(TASKS, ax, method="amp")
    (interval,) = segments(ax)
    np.testing.assert_allclose(interval, [[[0.35, 0], [0.5, 0]], [[0.6, 1], [0.75, 1]]])
    points = ax.containers[0].lines[0]
    assert list(zip(points.get_xdata(), points.get_ydata(), strict=True)) == [(0.4, "arc_easy"), (0.7, "piqa")]
    chance = next(line for line in ax.get_lines() if line.get_label() == "chance")
    assert list(zip(chance.get_xdata(), chance.get_ydata(), strict=True)) == [(0.25, "arc_easy"), (0.5, "piqa")]
    assert ax.get_xlabel() == "accuracy" and ax.get_xlim() == (0, 1)


def test_every_criterion_has_a_look_of_its_own():
    assert len({plots.CRITERION[name] for name in ("none", *CRITERIA)}) == len(CRITERIA) + 1


def test_criteria_are_drawn_as_the_mean_and_the_span_of_their_seeds(ax):
    plots.criteria_against_size(SEEDS, ax, quality="cut_fraction")
    points, colour = lines(ax)["random"]
    np.testing.assert_allclose(points, [[0, 0.9], [1, 0.6]])
    assert colour == plots.CRITERION["random"][0].lower()
    band = ax.collections[1].get_paths()[0].get_extents()  # consensus is drawn first
    np.testing.assert_allclose([band.x0, band.y0, band.x1, band.y1], [0, 0.5, 1, 0.9])


def test_rounds_show_the_three_tests_and_the_interval_of_the_last(ax):
    plots.rounds(ROUNDS, ax)
    found = {label: points for label, (points, _) in lines(ax).items()}
    assert found["tuned"] == [[0, 0.9], [1, 0.8]]
    assert found["cut"][1] == [1, 0.2] and found["cut, batch norms measured anew"][1] == [1, 0.5]
    band = ax.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.y0, band.y1], [0.7, 1.0])


def test_losses_are_smoothed_over_the_last_steps_only(ax):
    values = [4.0] * 30 + [1.0] * 25
    single, mean = plots.losses(values, ax).lines
    assert list(single.get_ydata()) == values and list(mean.get_xdata()) == list(range(1, 56))
    assert mean.get_ydata()[29] == 4.0 and mean.get_ydata()[-1] == 1.0 and 1.0 < mean.get_ydata()[40] < 4.0


def test_ranks_and_agreements_stand_where_their_names_stand(ax):
    plots.rank_map(RANKS, ax)
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), RANKS.to_numpy())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["cka", "wasserstein"]
    other = Figure().add_subplot()
    plots.agreement(RANKS.corr(method="spearman"), other)
    assert {tuple(map(round, t.get_position())): t.get_text() for t in other.texts} == {
        (0, 0): "1.0", (1, 1): "1.0", (0, 1): "-0.5", (1, 0): "-0.5"}


def test_time_and_multiply_adds_are_shares_of_the_dense_network(ax):
    plots.time_against_macs(COSTS, ax)
    np.testing.assert_allclose(ax.containers[0].lines[0].get_xydata(), [[1, 1], [0.5, 0.75]])
    np.testing.assert_allclose(segments(ax)[0], [[[1, 0.95], [1, 1.1]], [[0.5, 0.725], [0.5, 0.8]]])
    assert lines(ax)["time falls with the multiply-adds"][0] == [[0, 0], [1, 1]]


def test_heads_stay_in_place_each_as_a_share_of_its_blocks_mean(ax):
    plots.importance_map(torch.tensor([[1.0, 3.0, 2.0], [30.0, 20.0, 10.0]]), ax, parts="head")
    (image,) = ax.get_images()
    np.testing.assert_allclose(image.get_array(), [[0.5, 1.5, 1.0], [1.5, 1.0, 0.5]])
    assert image.origin == "lower"  # the first block is at the bottom, as on the pages
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "block")
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["share of the block's mean"]


def test_many_neurons_are_sorted_within_their_block(ax):
    scores = torch.rand(3, 100, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [5.0], [50.0]])
    plots.importance_map(scores, ax, parts="neuron")
    shown = np.asarray(ax.get_images()[0].get_array())
    np.testing.assert_allclose(shown, (scores / scores.mean(1, keepdim=True)).sort(1).values, rtol=1e-5)
    assert ax.get_xlabel() == "neuron, sorted"


def test_the_style_holds_inside_its_block_only():
    def settings():
        return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}

    before = settings()
    with plots.style():
        assert mpl.rcParams["font.size"] == 12 and not mpl.rcParams["axes.spines.top"]
    assert settings() == before


def test_a_notebooks_first_figure_inside_the_style_leaves_interactive_drawing_on():
    before = mpl.is_interactive()
    try:
        mpl.interactive(False)
        with plots.style():
            mpl.interactive(True)
        assert mpl.is_interactive()
    finally:
        mpl.interactive(before)


def test_importing_and_drawing_need_no_display(tmp_path):
    code = ("import sys; import pandas as pd; from pruning_lib.report import plots\n"
            "from matplotlib.figure import Figure\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"  # pyplot would choose a window system
            "table = pd.DataFrame({'label': ['amp'], 'method': ['amp'], 'energy_j': [3.0]})\n"
            "plots.bars(table, Figure().add_subplot(), quality='energy_j').figure.savefig('figure.png')\n")
    plain = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_are_in_order_of_size_and_two_networks_of_a_criterion_differ_by_their_line(ax):
    plots.budgets(BUDGETS, ax)
    drawn = lines(ax)
    assert drawn["dense final"] == ([[0, 0.9], [10, 0.2]], "#000000") and drawn["a"][0] == [[0, 0.8], [10, 0.3]]
    assert drawn["a"][1] == drawn["b"][1] == plots.CRITERION["consensus"][0].lower()
    assert len({line.get_linestyle() for line in ax.get_lines()[1:]}) == 2


@pytest.mark.parametrize("quality, unit, ends", [("reliance", "fraction", [[-0.1, 0.2], [0.3, 0.6]]),
                                                 ("energy", "j", [[2.0, 3.5], [3.0, 6.0]])])
def test_points_have_their_intervals_and_the_first_is_on_top(ax, quality, unit, ends):
    plots.points(POINTS, ax, quality=quality, unit=unit)
    (found,) = segments(ax)
    assert [[round(x, 6) for x, _ in ends] for ends in found] == ends
    assert [text.get_text() for text in ax.get_yticklabels()][-1] == "dense" and ax.get_xlim()[0] <= 0


def test_a_forest_has_a_place_per_label_and_a_look_per_kind(ax):
    table = pd.DataFrame([("amp", "cut", 30.0, 28.0, 33.0), ("amp", "tuned", 20.0, 19.0, 22.0),
                          ("wanda", "cut", 40.0, 35.0, 41.0)], columns=["label", "kind", "perplexity", "low", "high"])
    plots.forest(table, ax, quality="perplexity")
    cut, tuned = segments(ax)
    np.testing.assert_allclose(cut, [[[28, 0], [33, 0]], [[35, -1], [41, -1]]])
    np.testing.assert_allclose(tuned, [[[19, 0], [22, 0]]])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["amp", "wanda"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cut", "tuned"]
    assert len({line.get_color() for line in ax.get_lines() if line.get_marker() in "os"}) == 2


def test_many_criteria_become_at_most_six_lines_and_few_stay_apart(ax):
    names = list(plots.CRITERION)
    rows = pd.DataFrame([(name, removed, 0.9 - removed * (0.1 + 0.01 * place)) for place, name in enumerate(names)
                         for removed in (0, 1)], columns=["criterion", "removed", "cut_fraction"])
    drawn = lines(plots.criteria_against_size(rows, ax, quality="cut_fraction"))
    assert set(drawn) == {"none", "consensus", "random", "front to back", "one metric alone (8)", "other rankings (2)"}
    metrics = rows[rows.criterion.isin(series.GROUPS["one metric alone"]) & (rows.removed == 1)].cut_fraction
    assert drawn["one metric alone (8)"][0][1][1] == pytest.approx(metrics.mean())
    few = rows[rows.criterion.isin(names[:6])]
    assert series.few_series(few) is few


def test_numbers_on_a_figure_have_a_space_before_the_sign_and_do_not_touch():
    import matplotlib.pyplot as plt
    with plots.style():
        fig, (first, second) = plt.subplots(2, figsize=(6, 4))
        amp = pd.DataFrame({"method": ["amp", "random"], "ppl": [20.0, 5e6]})
        plots.draws(amp, first, quality="ppl", label="20% gone")
        plots.points(POINTS.assign(label=["10%", "a"]), second, quality="reliance")
    fig.canvas.draw()
    assert first.get_xlabel() == "20\u00a0% gone" and "10\u00a0%" in [t.get_text() for t in second.get_yticklabels()]
    boxes = [t.get_window_extent() for t in first.get_xticklabels() if t.get_text() and first.get_xlim()[0]
             <= t.get_position()[0] <= first.get_xlim()[1]]
    assert len(boxes) > 1 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert all(t.get_text().endswith("\u00a0%") for t in second.get_xticklabels())
    plt.close(fig)
