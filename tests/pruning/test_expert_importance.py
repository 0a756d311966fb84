"""Scores of experts against their definition, token by token; the plan reaches what it is asked for."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pruning_lib.models import checkpoints, expert_surgery, families, surgery
from pruning_lib.models.hooks import inputs_to
from pruning_lib.models.toy_models import toy
from pruning_lib.pruning import pipeline
from pruning_lib.pruning.expert_importance import choose_experts, expert_importance
from pruning_lib.pruning.pipeline import prune

IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
BATCH = [{"input_ids": IDS, "attention_mask": MASK}]


def by_definition(model, blocks, pairs):
    """Return the scores of experts and neurons, token by token.

    ``pairs(moe, token)`` yields, for every expert of a token, its number, its output times its router weight, and its
    activations; one padded prompt of ``IDS`` after the other.
    """
    s, seen = expert_surgery.sizes(model), {}
    experts, neurons = torch.zeros(len(blocks), s.experts), torch.zeros(len(blocks), s.experts, s.neurons)
    for ids, mask in zip(IDS, MASK, strict=True):
        with torch.no_grad(), inputs_to(blocks, lambda i, x: seen.update({i: x[0]})):
            model(input_ids=ids[None, :mask.sum()])
        for i, moe in enumerate(blocks):
            for e, output, fired in (pair for token in seen[i] for pair in pairs(moe, token)):
                experts[i, e] += output.abs().sum() / mask.sum() / 2
                neurons[i, e] += fired.abs() / mask.sum() / 2
    return experts, neurons


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_scores_equal_their_definition(name):
    model = toy(name)

    def pairs(mlp, token):
        weights, chosen = (mlp.gate.weight @ token).softmax(-1).topk(mlp.gate.top_k)
        weights = weights / weights.sum() if model.config.norm_topk_prob else weights
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            gate, up = (mlp.experts.gate_up_proj[e] @ token).chunk(2)
            fired = F.silu(gate) * up
            yield e, weight * (mlp.experts.down_proj[e] @ fired), fired

    experts, neurons = by_definition(model, [block.mlp for block in families.blocks(model)], pairs)
    found = expert_importance(model, BATCH)
    torch.testing.assert_close(found.experts, experts, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.neurons, neurons, rtol=1e-4, atol=1e-6)


def test_scores_of_llama_4_equal_their_definition():
    """Its router weight, a sigmoid, multiplies the token before the expert sees it."""
    model = toy("llama4_text")

    def pairs(moe, token):
        values, chosen = (moe.router.weight @ token).topk(moe.top_k)
        for value, e in zip(values.sigmoid(), chosen.tolist(), strict=True):
            gate, up = ((value * token) @ moe.experts.gate_up_proj[e]).chunk(2)
            fired = F.silu(gate) * up
            yield e, fired @ moe.experts.down_proj[e], fired

    blocks = [families.blocks(model)[i].feed_forward for i in expert_surgery.sizes(model).blocks]
    experts, neurons = by_definition(model, blocks, pairs)
    found = expert_importance(model, BATCH)
    torch.testing.assert_close(found.experts, experts, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.neurons, neurons, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("silent", [True, False])
def test_scores_of_jetmoe_equal_their_definition(silent):
    """Its experts take tokens in the order of the experts; its attention has experts too, which go with them."""
    model = toy("jetmoe")
    for block in families.blocks(model) if silent else ():
        block.self_attention.experts.output_linear.weight.data.zero_()

    def pairs(moe, token):
        values, chosen = (moe.router.layer.weight @ token).topk(moe.router.top_k)
        for value, e in zip(values.softmax(-1), chosen.tolist(), strict=True):
            gate, up = (moe.input_linear.weight[e] @ token).chunk(2)
            fired = moe.activation(gate) * up
            yield e, value * (moe.output_linear.weight[e] @ fired), fired

    experts, neurons = by_definition(model, [block.mlp for block in families.blocks(model)], pairs)
    found = expert_importance(model, BATCH)
    torch.testing.assert_close(found.neurons, neurons, rtol=1e-4, atol=1e-6)
    if silent:
        torch.testing.assert_close(found.experts, experts, rtol=1e-4, atol=1e-6)
    else:
        assert (found.experts > experts + 1e-3).all()


def test_more_neurons_than_the_model_is_wide_are_read_in_several_rounds():
    model = toy("qwen3_moe", moe_intermediate_size=72)  # width 32
    found = expert_importance(model, BATCH)
    assert (found.neurons.sum((0, 1)) > 0).all() and found.neurons.shape == (2, 4, 72)


def test_the_model_is_as_before_after_it_was_scored():
    model = toy("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expert_importance(model, BATCH)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "ernie4_5_moe", "jetmoe", "longcat_flash"])
def test_the_least_important_go_and_the_fraction_is_reached(name):
    model = toy(name)
    found = expert_importance(model, BATCH)
    plan = choose_experts(found, model, experts_removed=1, removed_fraction=0.25, multiple_of=4)
    pruned = surgery.remove(model, plan)
    assert families.parameter_count(pruned) == plan.sizes.parameters - plan.removed_parameters
    step = plan.sizes.removed_parameters(1, 4) - plan.sizes.removed_parameters(1, 0)
    assert abs(plan.removed_fraction - 0.25) * plan.sizes.parameters <= step / 2 + 1
    assert torch.equal(plan.experts.flatten(), found.experts.argmin(1))
    gone = found.neurons.gather(2, plan.neurons).amax(-1)
    stay = found.neurons.scatter(2, plan.neurons, torch.inf).amin(-1)
    assert (gone <= stay).all()


def test_a_fraction_out_of_reach_is_refused_with_the_range():
    model = toy("mixtral")
    found = expert_importance(model, BATCH)
    with pytest.raises(ValueError, match="reachable: 0.1606 to"):
        choose_experts(found, model, experts_removed=1, removed_fraction=0.05, multiple_of=4)
    with pytest.raises(ValueError, match="4 experts, one stays"):
        choose_experts(found, model, experts_removed=4)


def test_experts_that_take_other_arguments_are_refused_with_the_reason():
    model = toy("mixtral")
    experts = families.blocks(model)[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: (*args, None))
    with pytest.raises(ValueError, match="other arguments"):
        expert_importance(model, BATCH)


@pytest.mark.parametrize(("name", "arguments", "kept"), [
    ("mixtral", {"experts_removed": 1}, (3, 24)), ("jetmoe", {"experts_removed": 1}, (3, 24)),
    ("longcat_flash", {"experts_removed": 1}, (3, 20)),
    ("qwen3_moe", {"removed_fraction": 0.2, "multiple_of": 4}, (4, 12)),  # all of its neurons are inside experts
    ("deepseek_v3", {"experts_removed": 1, "removed_fraction": 0.3, "multiple_of": 4}, (3, 8))])
def test_prune_removes_experts_and_the_checkpoint_loads_plainly(name, arguments, kept, tmp_path):
    model = toy(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = prune(model, BATCH, **arguments)
    s, found = expert_surgery.sizes(result.model), expert_importance(model, BATCH)
    assert (s.experts, s.neurons) == kept and torch.equal(result.plan.experts, choose_experts(
        found, model, experts_removed=arguments.get("experts_removed", 0)).experts)
    assert result.reached_fraction == pytest.approx(result.plan.removed_fraction) and "experts" in result.steps[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    checkpoints.save(result.model, None, tmp_path / "cut")
    with torch.no_grad():
        ours, theirs = (m(input_ids=IDS).logits for m in (
            result.model, AutoModelForCausalLM.from_pretrained(tmp_path / "cut")))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("mixtral", {"experts_removed": 3}, "1 experts would stay, every token goes to 2"),
    ("mixtral", {"experts_removed": 4}, "4 experts, one stays"),
    ("mixtral", {"experts_removed": 1, "removed_fraction": 0.05}, "reachable: 0.1606 to"),
    ("mixtral", {"experts_removed": 1, "method": "wanda"}, "scored by method='amp'.*method='wanda'"),
    ("mixtral", {"experts_removed": 1, "heads_removed": 2}, "heads_removed=2.*by another call"),
    ("mixtral", {"experts_removed": 1, "criterion": "block_influence", "blocks_removed": 1}, "no criterion"),
    ("mixtral", {}, "removed_fraction is missing"),
    ("gemma2", {"experts_removed": 1}, "no experts that can be cut: its blocks have no experts")])
def test_experts_that_prune_cannot_remove_are_refused_before_they_are_scored(name, arguments, message, monkeypatch):
    monkeypatch.setattr(pipeline, "expert_importance", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match=message):
        prune(toy(name), BATCH, **arguments)
