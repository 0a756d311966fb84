"""Width, depth and both reach the same size, and equal the separate steps one after the other."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from pruning_lib.models import checkpoints, families, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.pruning import amp, block_ranking, importance, pipeline, reconstruction, selection

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (4, 3, 40), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_width_alone_is_the_plan_of_the_method_carried_out(family, tiny, batches):
    model = tiny(family, heads=6, groups=3, neurons=60)
    before = logits(model)
    found = pipeline.prune(model, batches, method="wanda", removed_fraction=0.2, heads_removed=2, reconstruction="none")
    scores = importance.wanda(model, batches)
    plan = selection.choose(scores, model, removed_fraction=0.2, heads_removed=2)
    assert torch.equal(logits(found.model), logits(surgery.remove(model, plan)))
    assert found.reached_fraction == pytest.approx(plan.removed_fraction, abs=1e-12)
    assert found.steps == (f"wanda: {plan}",) and not found.reconstructions
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", importance.METHODS)
def test_what_any_width_method_removes_can_be_reconstructed(tiny, batches, method):
    model = tiny("llama", heads=6, groups=3, neurons=60)
    cut, repaired = (pipeline.prune(model, batches, method=method, removed_fraction=0.2, heads_removed=2, seed=3,
                                   reconstruction=how, text=batches) for how in ("none", "one_pass"))
    assert repaired.steps[0] == cut.steps[0] and torch.equal(repaired.plan.neurons, cut.plan.neurons)
    assert len(repaired.reconstructions) == 2 * len(families.blocks(model))
    assert all(repair.error < repair.cut_error for repair in repaired.reconstructions)
    assert not torch.equal(logits(repaired.model), logits(cut.model))


@pytest.mark.parametrize("mode", reconstruction.MODES)
def test_reconstruction_is_solved_on_the_text_that_is_given(tiny, batches, mode):
    model = tiny("llama", heads=6, groups=3, neurons=60)
    prompts, text = batches[:2], batches[1:]
    found = pipeline.prune(model, prompts, removed_fraction=0.2, heads_removed=2, reconstruction=mode, text=text)
    plan = selection.choose(amp.importance(model, prompts), model, removed_fraction=0.2, heads_removed=2)
    expected, reconstructions = reconstruction.reconstruct(model, plan, text, ridge=reconstruction.RIDGES, mode=mode)
    assert torch.equal(logits(found.model), logits(expected)) and found.reconstructions == tuple(reconstructions)
    without = pipeline.prune(model, prompts, removed_fraction=0.2, heads_removed=2, reconstruction=mode)
    assert without.reconstructions != found.reconstructions
    assert set(found.seconds) == {"scores_s", "reconstruction_s"}
    chosen = pipeline.prune(model, prompts, method="reconstruction_error", removed_fraction=0.2, heads_removed=2,
                            text=text, reconstruction="none")
    scores = reconstruction.reconstruction_error(model, text)
    plan = selection.choose(scores, model, removed_fraction=0.2, heads_removed=2)
    assert chosen.steps == (f"reconstruction_error: {plan}",)
    assert torch.equal(logits(chosen.model), logits(surgery.remove(model, plan)))


def test_by_default_the_heads_stay_and_the_output_projections_are_re_solved(tiny, batches):
    """The book's report finds this best for AMP: ``test_the_report_recommends_the_defaults``."""
    model = tiny("llama", heads=6, groups=3, neurons=96)
    found = pipeline.prune(model, batches, removed_fraction=0.2)
    plan = selection.choose(amp.importance(model, batches), model, removed_fraction=0.2, heads_removed=0)
    expected, _ = reconstruction.reconstruct(model, plan, batches, mode="sequential")
    assert torch.equal(logits(found.model), logits(expected))
    assert found.steps[1] == ("reconstruction: sequential, output projections re-solved by least squares on 480 tokens")


def test_the_report_recommends_the_defaults():
    """Require that the default is the AMP recipe with the lowest perplexity on the test text, at 20 and at 30 %."""
    records = [json.loads(path.read_text()) for path in (ROOT / "data" / "results").glob("recipe-*.json")]
    for fraction in (0.2, 0.3):
        alike = [r for r in records if r["parameters"]["method"] == "amp" and r["parameters"]["criterion"] == "none"
                 and r["parameters"]["removed_fraction"] == fraction]
        best = min(alike, key=lambda r: r["values"]["perplexity"])["parameters"]
        assert (best["reconstruction"], best["heads_removed"]) == (pipeline.BEST, 0) and len(alike) > 4
    defaults = {name: p.default for name, p in inspect.signature(pipeline.prune).parameters.items()}
    assert (defaults["method"], defaults["heads_removed"], defaults["reconstruction"]) == ("amp", 0, "auto")
    assert pipeline.mode_of("auto", "amp") == pipeline.BEST and pipeline.mode_of("auto", "none") == "none"


@pytest.mark.parametrize("texts", [1, 2])
def test_one_batch_is_enough_to_hold_a_text_out_and_one_text_is_not(tiny, batches, texts):
    model, looked = tiny("llama", neurons=96), []
    batch = {name: part[:texts] for name, part in batches[0].items()}
    if texts == 2:
        found = pipeline.prune(model, [batch], removed_fraction=0.2)
        assert all(layer.error < layer.cut_error for layer in found.reconstructions)
        return
    model.register_forward_pre_hook(lambda *_: looked.append(1))
    with pytest.raises(ValueError, match="1 texts for the reconstruction; give at least 2.*reconstruction='none'"):
        pipeline.prune(model, [batch], removed_fraction=0.2)
    assert not looked


@pytest.mark.parametrize(("calibration", "wanted"), [
    ("alpaca", "c4"), ("mini_prompts", "mini_calibration_text"), ("mine.jsonl", None), (["a", "b"], None)])
def test_the_long_text_belongs_to_the_prompts(calibration, wanted):
    assert pipeline.long_text(None, calibration) == wanted
    assert pipeline.long_text("mine.txt", calibration) == "mine.txt"


@pytest.mark.parametrize("criterion", ["block_influence", "cka"])
def test_depth_alone_takes_the_nearest_number_of_blocks_in_the_order_of_the_criterion(family, tiny, batches, criterion):
    model = tiny(family, n_blocks=5)
    found = pipeline.prune(model, batches, method="none", criterion=criterion, removed_fraction=0.3)
    block, whole = (sum(p.numel() for p in m.parameters()) for m in (families.blocks(model)[0], model))
    wanted = min(range(1, 5), key=lambda n: abs(n * block / whole - 0.3))
    order = block_ranking.CRITERIA[criterion].order(model, batches, None, 0)
    expected = surgery.remove(model, BlockPlan.of(model, order[:wanted]))
    assert torch.equal(logits(found.model), logits(expected))
    assert found.reached_fraction == pytest.approx(wanted * block / whole)


@pytest.mark.parametrize("blocks", [1, 2])
def test_width_and_then_depth_reach_the_fraction_together(family, tiny, batches, blocks, tmp_path):
    model = tiny(family, n_blocks=6, neurons=120)
    found = pipeline.prune(model, batches, method="amp", criterion="block_influence", blocks_removed=blocks,
                          removed_fraction=0.4, heads_removed=0, reconstruction="none")
    s = families.sizes(model)
    assert abs(found.reached_fraction - 0.4) * s.parameters <= s.blocks * s.neuron_parameters
    assert families.sizes(found.model).blocks == 6 - blocks == 6 - len(found.blocks) and len(found.steps) == 2
    assert found.steps[1].endswith(", ".join(found.blocks)) and found.plan is not None
    narrow = pipeline.prune(model, batches, method="amp", heads_removed=0, reconstruction="none",
                           removed_fraction=pipeline._left_for_width(model, 0.4, blocks)).model
    order = block_ranking.CRITERIA["block_influence"].order(narrow, batches, None, 0)
    expected = surgery.remove(narrow, BlockPlan.of(narrow, order[:blocks]))
    assert torch.equal(logits(found.model), logits(expected))
    checkpoints.save(found.model, None, tmp_path / "stored")


@pytest.mark.parametrize(("arguments", "message"), [
    ({"method": "largest"}, "unknown method 'largest'"),
    ({"criterion": "size"}, "unknown criterion of language models 'size'; known: block_influence"),
    ({"method": "none"}, "both 'none'"),
    ({"reconstruction": "yes"}, "allowed: auto, none, one_pass, sequential, asymmetric"),
    ({"method": "none", "criterion": "cka", "reconstruction": "one_pass"}, "reconstruction is for width pruning"),
    ({"criterion": "cka"}, "give both"), ({"blocks_removed": 1}, "give both"),
    ({"criterion": "cka", "blocks_removed": 4, "removed_fraction": 0.1}, "give at most 0"),
    ({"criterion": "cka", "blocks_removed": 5}, "allowed: 0 to 4"), ({"removed_fraction": 0.99}, "cannot be reached"),
    ({"heads_removed": 1}, "not a lossless cut"), ({"removed_fraction": 0}, "removes nothing"),
    ({"removed_fraction": 1e-4}, "less than half a neuron of every block, so nothing would be removed"),
])
def test_what_makes_no_sense_is_refused_before_anything_is_measured(tiny, batches, arguments, message):
    model = tiny("llama", n_blocks=5)
    looked = []
    model.register_forward_pre_hook(lambda *_: looked.append(1))
    with pytest.raises(ValueError, match=message):
        pipeline.prune(model, batches, **{"removed_fraction": 0.3, **arguments})
    assert not looked
