"""A cut is measured once, equals the plain procedure, and everything it depends on is in its key."""

from dataclasses import replace

import pytest
import torch

from pruning_lib._files import cache
from pruning_lib.data.batching import batches
from pruning_lib.evaluation import quality
from pruning_lib.experiments import measured_cuts
from pruning_lib.experiments.measured_cuts import Setting
from pruning_lib.models import surgery
from pruning_lib.pruning import importance
from pruning_lib.pruning.reconstruction import reconstruct
from pruning_lib.pruning.selection import choose

TEXTS = ["It is a truth universally acknowledged,", "that a single man in possession of a good fortune."]
PROMPTS = ["must be in want of a wife.", "However little known", "the feelings or views"]


@pytest.fixture
def setting(tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    return Setting("toy", tiny("llama", neurons=40, vocabulary=128), tokenizer, TEXTS, tokens=64, window=16)


def plainly(setting, method, fraction, seed=0):
    scores = importance.METHODS[method].importance(setting.network, batches(PROMPTS, setting.tokenizer))
    plan = choose(scores, setting.network, removed_fraction=fraction, heads_removed=0,
                  rule=importance.METHODS[method].rule, multiple_of=1, seed=seed)
    return quality.perplexity(surgery.remove(setting.network, plan), setting.tokenizer, TEXTS, window=16, stride=16,
                              max_tokens=64)


@pytest.mark.parametrize(("method", "seed"), [("amp", 0), ("peak_to_peak", 0), ("taylor", 0), ("random", 3)])
def test_a_cut_is_the_plain_procedure(setting, method, seed):
    prompts = () if method == "random" else PROMPTS
    found = measured_cuts.cut(setting, method, removed_fraction=0.2, prompts=prompts, seed=seed)
    expected = plainly(setting, method, 0.2, seed)
    assert found["windows"] == expected["windows"] and found["removed_fraction"] == pytest.approx(0.2, abs=0.02)


def test_a_cut_with_reconstruction_is_the_plain_procedure_under_a_key_of_its_own(setting):
    plain = measured_cuts.cut(setting, "amp", removed_fraction=0.2, prompts=PROMPTS)
    found = measured_cuts.cut(setting, "amp", removed_fraction=0.2, prompts=PROMPTS, reconstruction="sequential",
                              solved_on=TEXTS * 60)
    scores = importance.METHODS["amp"].importance(setting.network, batches(PROMPTS, setting.tokenizer))
    plan = choose(scores, setting.network, removed_fraction=0.2, multiple_of=1)
    model, _ = reconstruct(setting.network, plan, batches(TEXTS * 60, setting.tokenizer), progress=False)
    expected = quality.perplexity(model, setting.tokenizer, TEXTS, window=16, stride=16, max_tokens=64)
    assert found["windows"] == expected["windows"] != plain["windows"]


def test_a_second_run_measures_nothing(setting, monkeypatch):
    first = measured_cuts.cut(setting, "amp", removed_fraction=0.2, prompts=PROMPTS), measured_cuts.dense(setting)
    monkeypatch.setattr(quality, "perplexity", lambda *_, **__: pytest.fail("measured again"))
    assert (measured_cuts.cut(setting, "amp", removed_fraction=0.2, prompts=PROMPTS),
            measured_cuts.dense(setting)) == first


def test_the_scores_of_a_draw_serve_every_fraction(setting, monkeypatch):
    measured_cuts.cut(setting, "amp", removed_fraction=0.1, prompts=PROMPTS)
    monkeypatch.setattr(measured_cuts, "batches", lambda *_: pytest.fail("scored again"))
    assert measured_cuts.cut(setting, "amp", removed_fraction=0.2, prompts=PROMPTS)["perplexity"] > 1


@pytest.mark.parametrize("changed", [{"name": "other"}, {"tokens": 48}, {"window": 8}, {"text": TEXTS[::-1]}])
def test_another_setting_is_another_measurement(setting, changed):
    measured_cuts.dense(setting)
    kept = set((cache() / "cuts").iterdir())
    measured_cuts.dense(replace(setting, **changed))
    assert len(set((cache() / "cuts").iterdir()) - kept) == 1


def test_an_interrupted_measurement_leaves_nothing_and_a_broken_file_is_named(setting, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quality, "perplexity", stop)
        measured_cuts.dense(setting)
    assert not list((cache() / "cuts").glob("*"))
    measured_cuts.dense(setting)
    (file,) = (cache() / "cuts").glob("*.json")
    file.write_text("{")
    with pytest.raises(ValueError, match=f"{file.name} cannot be read.*delete it"):
        measured_cuts.dense(setting)


def test_the_model_that_is_cut_stays_as_it_was(setting):
    before = {name: tensor.clone() for name, tensor in setting.network.state_dict().items()}
    measured_cuts.cut(setting, "taylor", removed_fraction=0.2, prompts=PROMPTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in setting.network.state_dict().items())
