"""Costs equal counts by hand and published values; time, memory and energy cover the given work only."""

import json
import socket
import time

import numpy as np
import pytest
import torch
from conftest import hooks_of, image_network, pixels
from torch import nn

from pruning_lib.data.text import INPUTS
from pruning_lib.evaluation import cost
from pruning_lib.models import families
from pruning_lib.pruning import block_ranking, consensus

PUBLISHED = json.loads((INPUTS / "published_consensus_networks.json").read_text())["networks"]
MB = 2 ** 20


# --- multiply-adds and parameters -------------------------------------------------------------------------------------


def test_a_convolution_and_a_linear_layer_cost_what_they_cost_by_hand():
    """Count 5 x 5 pixels of 8 channels from 3 x 3 x 3 each; groups use their own channels; biases do not count."""
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert cost.macs(convolution, torch.zeros(2, 3, 9, 9)) == 2 * 8 * 25 * 27
    assert cost.macs(nn.Conv2d(6, 6, 3, groups=6), torch.zeros(1, 6, 5, 5)) == 6 * 9 * 9
    assert cost.macs(nn.Linear(7, 5), torch.zeros(4, 7)) == 4 * 35
    assert cost.macs(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), torch.zeros(2, 3, 9, 9)) == 0


def test_resnet56_and_what_is_left_of_it_cost_what_was_published():
    """Remove blocks front to back: from 125.7 to 26.7 million multiply-adds, 78.8 % less, in 21 steps."""
    model, image = image_network("cifar_resnet", depth=56, shortcut="projection"), pixels()[:1]
    steps = consensus.prune(model, lambda m: block_ranking.front_to_back(m, None, None, 0), rounds=21)
    found = [cost.macs(network, image) for network in (model, *(step.model for step in steps))]
    assert found == [network["macs"] for network in PUBLISHED]
    assert found[0] == 125_747_840 and found[-1] == 26_657_408
    assert f"{1 - found[-1] / found[0]:.2%}" == "78.80%"
    assert [round(100 * (1 - macs / found[0]), 2) for macs in found] == [n["removed_macs_percent"] for n in PUBLISHED]


def test_a_language_model_costs_its_projections_and_a_little_attention(family, tiny):
    model, ids = tiny(family), torch.full((2, 11), 5)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    found = cost.macs(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    s = families.sizes(model)
    attention = 2 * s.blocks * s.heads * 11 * 11 * s.head_width  # of each prompt: queries by keys, shares by values
    assert 22 * linear < found <= 22 * linear + 1.2 * 2 * attention


def test_counting_changes_nothing():
    model = image_network("cifar_resnet", depth=8).train()
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost.macs(model, pixels())
    cost.latency(model, pixels(), repetitions=1, warmup=0)
    assert model.training and not model.layer1[0].training and not hooks_of(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shared_parameters_count_once(tiny):
    count, layer = families.parameter_count, nn.Linear(3, 4)
    assert count(layer) == 16 == count(nn.Sequential(layer, nn.BatchNorm1d(4), layer)) - 8
    model = tiny("llama", fields={"tie_word_embeddings": True})
    assert count(model) == families.sizes(model).parameters == count(tiny("llama")) - 128 * 48


# --- time -------------------------------------------------------------------------------------------------------------


class Taking(nn.Module):
    """Work that takes the given seconds, call by call, on a simulated clock."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.clock, self.given = list(seconds), 0.0, []

    def forward(self, x=None, **named):
        self.clock += self.seconds.pop(0)
        self.given.append((named or x, torch.is_grad_enabled(), self.training))


def test_latency_is_the_median_with_quartiles_after_a_warm_up(monkeypatch):
    model, x = Taking([100, 50, 5, 1, 4, 2, 3]), torch.zeros(1)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: model.clock)
    assert cost.latency(model, x, repetitions=5, warmup=2) == {
        "latency_s": 3, "latency_low_s": 2, "latency_high_s": 4, "repetitions": 5}
    assert model.given == [(x, False, False)] * 7


def test_a_language_model_gets_its_inputs_by_name():
    model = Taking([0.0])
    cost.latency(model, {"input_ids": 1, "attention_mask": 2}, repetitions=1, warmup=0)
    assert model.given == [({"input_ids": 1, "attention_mask": 2}, False, False)]


def test_real_times_are_in_order_and_positive():
    found = cost.latency(image_network("cifar_resnet", depth=8), pixels(), repetitions=5)
    assert 0 < found["latency_low_s"] <= found["latency_s"] <= found["latency_high_s"] < 5


@pytest.mark.parametrize("repetitions", [0, -1])
def test_no_repetition_is_no_time(repetitions):
    with pytest.raises(ValueError, match=f"repetitions={repetitions}; give at least 1"):
        cost.latency(nn.Identity(), torch.zeros(1), repetitions=repetitions)


# --- memory -----------------------------------------------------------------------------------------------------------


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts GPU memory where there is one")


@on_cpu
def test_memory_taken_for_a_moment_shows_in_full():
    """Require that memory freed before does not count and does not hide the second allocation."""
    def work():
        np.ones(64 * MB, np.uint8)  # freed at once

    np.ones(128 * MB, np.uint8)
    for found in (cost.peak_bytes(work), cost.peak_bytes(work)):
        assert found is None or 62 * MB < found < 84 * MB
    found = cost.peak_bytes(lambda: None)
    assert found is None or found < 8 * MB


@on_cpu
@pytest.mark.parametrize("missing", ["library", "file", "line"])
def test_where_the_system_cannot_say_the_work_is_done_all_the_same(monkeypatch, tmp_path, missing):
    (tmp_path / "status").write_text("Name: python\n")
    paths = {"/proc/self/status": tmp_path / "status", "/proc/self/clear_refs": tmp_path / "refs"}
    if missing == "file":
        paths["/proc/self/clear_refs"] = tmp_path / "no such folder" / "refs"
    monkeypatch.setattr(cost, "Path", lambda path: paths[path])
    monkeypatch.setattr(cost.ctypes, "CDLL", lambda _: object() if missing == "library" else Library())
    done = []
    assert cost.peak_bytes(lambda: done.append(1)) is None and done == [1]


class Library:
    def malloc_trim(self, _):
        pass


@pytest.mark.parametrize("error", [OSError, AttributeError, IndexError])
def test_work_that_fails_says_so(error):
    def work():
        raise error("of the work")

    with pytest.raises(error, match="of the work"):
        cost.peak_bytes(work)


# --- energy and carbon ------------------------------------------------------------------------------------------------


def busy(seconds):
    """Use the given amount of CPU time, independent of other load."""
    def work():
        start = time.process_time()
        while time.process_time() - start < seconds:
            sum(range(1000))

    return work


@pytest.fixture(scope="module")
def measured():
    """Return the emissions of 0.1 s and of 0.3 s of work on 10 inputs."""
    return [cost.emissions(busy(s), inputs=10, repetitions=5, at_least_s=0.3, idle_s=0.2) for s in (0.1, 0.3)]


def test_three_times_the_work_takes_about_three_times_the_energy_and_the_carbon(measured):
    one, three = measured
    assert 1.5 < three["energy_j"] / one["energy_j"] < 6
    assert three["kgco2e"] / one["kgco2e"] == pytest.approx(three["energy_j"] / one["energy_j"])
    for found in measured:
        assert found["energy_j_low"] <= found["energy_j"] <= found["energy_j_high"]
        assert found["interval_fraction"] == 0.9375 and found["repetitions"] == 5 and found["country"] == "BRA"
        assert found["how"].startswith("processor: ") and "not measured" not in found["how"]
        assert found["idle_w"] is not None and found["idle_w"] >= 0 and found["memory_j"] is not None


def test_an_estimate_is_called_one_and_is_the_share_of_the_cores_time_times_the_rated_power(measured):
    one, _ = measured
    if "estimate" not in one["how"]:
        pytest.skip("this machine has a counter; where there is none, the estimate is checked")
    watts = float(one["how"].split("estimate, ")[1].split(" W")[0])
    import psutil

    wanted = watts * 0.1 / psutil.cpu_count() * 100  # 0.1 s of one core for 10 inputs, per 1,000
    assert one["energy_j"] == pytest.approx(wanted, rel=0.35)


def test_energy_is_per_thousand_inputs_and_carbon_that_of_the_country(measured):
    found = {country: cost.emissions(busy(0.1), inputs=20, country=country, repetitions=5, at_least_s=0.1, idle_s=0.1)
             for country in ("FRA", "POL")}
    assert found["FRA"]["energy_j"] == pytest.approx(measured[0]["energy_j"] / 2, rel=0.5)
    france, poland = (found[c]["kgco2e"] / found[c]["energy_j"] for c in ("FRA", "POL"))
    assert 5 * france < poland < 1e-3  # nuclear and coal; a kilogram per joule would be absurd


def test_measuring_writes_nothing_says_nothing_and_calls_nobody(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    cost.emissions(busy(0.01), inputs=1, repetitions=5, at_least_s=0.05, idle_s=0.05)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_what_cannot_be_measured_is_none_and_never_zero(monkeypatch):
    import codecarbon

    asleep = cost.emissions(lambda: time.sleep(0.02), inputs=1, repetitions=5, at_least_s=0.02, idle_s=0.02)
    assert asleep["energy_j"] is None or asleep["energy_j"] > 0

    def fails(*_, **__):
        raise RuntimeError("no counter here")

    monkeypatch.setattr(codecarbon.OfflineEmissionsTracker, "stop_task", fails)
    done = []
    found = cost.emissions(lambda: done.append(1), inputs=1, repetitions=5, at_least_s=0, idle_s=0)
    assert found["energy_j"] is None and found["kgco2e"] is None and found["idle_w"] is None
    assert found["how"] == "not measured: RuntimeError: no counter here" and len(done) == 7 and found["wall_s"] > 0


def test_work_that_fails_under_measurement_says_so_and_too_few_repetitions_are_refused():
    with pytest.raises(ZeroDivisionError):
        cost.emissions(lambda: 1 / 0, inputs=1)
    with pytest.raises(ValueError, match="repetitions=4, inputs=1; give at least 5 and 1"):
        cost.emissions(lambda: None, inputs=1, repetitions=4)


@pytest.mark.parametrize("country", ["bra", "BR", "Brazil", "XXX", ""])
def test_a_country_without_a_known_grid_is_refused_and_not_the_mean_of_the_world(country):
    with pytest.raises(ValueError, match=f"no energy mix for country='{country}'; .* three letters, such as"):
        cost.emissions(lambda: None, inputs=1, country=country)
