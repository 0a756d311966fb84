"""Published configs have the published numbers of parameters; rows that were not run fit their models."""

import pytest
import torch
from test_notebooks import ROWS, TREE

from pruning_lib.experiments import runs
from pruning_lib.models import checkpoints, published_configs, surgery
from pruning_lib.pruning import importance, selection

NOT_RUN = {name: row for name, row in ROWS.items() if row.not_run}
TOO_LARGE = {name: row for name, row in NOT_RUN.items()
             if row.parameters.get("model") in published_configs.PUBLISHED_CONFIGS}


@pytest.mark.parametrize("name", published_configs.PUBLISHED_CONFIGS)
def test_a_shape_has_the_published_number_of_parameters_and_takes_no_memory(name):
    network = published_configs.random_model(name)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert sum(p.numel() for p in network.parameters()) == published_configs.PUBLISHED_CONFIGS[name].parameters


def test_random_weights_are_those_of_the_seed_and_leave_the_generator_alone(monkeypatch):
    monkeypatch.setitem(published_configs.PUBLISHED_CONFIGS, "toy",
                        published_configs.PublishedConfig("llama", 2, 32, 4, 2, 24, 64, 0))
    before = torch.get_rng_state()
    first, again, other = (next(published_configs.random_model("toy", device="cpu", seed=seed).parameters())
                           for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_row_that_was_not_run_can_be_carried_out_on_its_models_shape(name):
    """Run every step without data: choose a plan, prune, and build a config that transformers accepts."""
    row = TOO_LARGE[name]
    given = {**runs.parameters_of(runs.source(row, TREE)), **row.parameters}
    dense = published_configs.random_model(given["model"])
    asked = given.get("removed_fractions", str(given.get("removed_fraction", "")))  # "": scoring only
    for fraction in map(float, asked.split()):
        plan = selection.choose(importance.uniform(dense), dense, removed_fraction=fraction, seed=0, multiple_of=1,
                            heads_removed=given["heads_removed"])
        pruned = surgery.remove(dense, plan)
        left = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in dense.parameters())
        assert 1 - left == pytest.approx(fraction, abs=1e-3)
        stored = checkpoints._with_config(pruned, checkpoints._storable(pruned), pruned.dtype)  # as it is reloaded
        theirs, ours = ({k: v.shape for k, v in one.state_dict().items()} for one in (stored, pruned))
        assert theirs == ours


def test_rows_that_were_not_run_say_what_they_need():
    assert TOO_LARGE and all(len(row.not_run.split()) > 3 for row in NOT_RUN.values())
