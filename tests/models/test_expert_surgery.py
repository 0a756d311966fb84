"""Experts: cutting equals masking, by the families' own forward written out slowly; plain reload; refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pruning_lib.models import checkpoints, expert_surgery, families, surgery
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.models.toy_models import toy

TYPES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
MORE = ("deepseek_v3", "gpt_oss", "llama4_text", "ernie4_5_moe")  # shared experts, other routers, rows in pairs
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def plan_of(model, *, experts=1, neurons=4):
    """Return a plan with other experts and other neurons in every block and expert."""
    s, generator = expert_surgery.sizes(model), torch.Generator().manual_seed(3)

    def draw(*shape, k):
        return torch.rand(shape, generator=generator).argsort(-1)[..., :k].sort(-1).values

    plain = tuple(draw(n, k=s.plain_removed(i, neurons)) for i, n in enumerate(s.plain))
    return ExpertPlan(draw(len(s.blocks), s.experts, k=experts),
                      draw(len(s.blocks), s.experts, s.neurons, k=neurons), plain, s)


def slow_forward(module, gone_experts, gone_neurons, normalise):
    """Return the forward of a block of experts, one token and one expert at a time, with parts masked."""
    E, M = module.experts.down_proj.shape[0], module.experts.down_proj.shape[2]
    stays = torch.ones(E, M)
    for e in range(E):
        stays[e, gone_neurons[e]] = 0

    def forward(x):
        flat, out = x.reshape(-1, x.shape[-1]), []
        for token in flat:
            scores = module.gate.weight @ token
            scores[gone_experts] = -torch.inf
            weights, chosen = scores.softmax(-1).topk(module.gate.top_k)
            weights = weights / weights.sum() if normalise else weights
            total = torch.zeros_like(token)
            for weight, e in zip(weights, chosen.tolist(), strict=True):
                gate, up = (module.experts.gate_up_proj[e] @ token).chunk(2)
                total += weight * (module.experts.down_proj[e] @ (F.silu(gate) * up * stays[e]))
            out.append(total)
        result = torch.stack(out)
        if hasattr(module, "shared_expert"):
            result = result + torch.sigmoid(module.shared_expert_gate(flat)) * module.shared_expert(flat)
        return result.view_as(x)

    return forward


@pytest.mark.parametrize("name", TYPES)
def test_cutting_experts_equals_masking_them_and_reloads_plainly(name, tmp_path):
    model = toy(name)
    plan = plan_of(model)
    slow = copy.deepcopy(model)
    for i, block in enumerate(families.blocks(slow)):
        normalise = name == "mixtral" or model.config.norm_topk_prob
        block.mlp.forward = slow_forward(block.mlp, plan.experts[i], plan.neurons[i], normalise)
    pruned = surgery.remove(model, plan)
    assert (logits(model) - logits(slow)).abs().max() > 1e-2  # the removed parts did matter
    torch.testing.assert_close(logits(pruned), logits(slow), rtol=1e-4, atol=1e-5)
    s = expert_surgery.sizes(pruned)
    assert (s.experts, s.neurons) == (plan.sizes.experts - 1, plan.sizes.neurons - 4)
    assert s.parameters == plan.sizes.parameters - plan.removed_parameters
    checkpoints.save(pruned, None, tmp_path / "cut")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "cut")), logits(pruned))


@pytest.mark.parametrize("name", MORE)
def test_other_routers_and_layouts_are_cut_exactly(name, tmp_path):
    """Masked by weights at zero and router scores at minus infinity; ``tried`` compares these on two tokens only."""
    model = toy(name)
    experts, plan = expert_surgery.tried(model, experts_too=True), plan_of(model)
    masked = copy.deepcopy(model)
    blocks, s = families.blocks(masked), plan.sizes
    for i, block in enumerate(blocks):
        inside = plan.neurons[s.blocks.index(i)] if i in s.blocks else None
        expert_surgery.mask_neurons(block, experts, i, inside, plan.plain[i])
    with expert_surgery.masked_routers({i: (blocks[i], plan.experts[n]) for n, i in enumerate(s.blocks)}, experts):
        expected = logits(masked)
    pruned = surgery.remove(model, plan)
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-4, atol=1e-4)
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(pruned))


def test_heads_of_a_mixture_of_experts_are_cut_as_those_of_any_model(random_importance):
    from pruning_lib.pruning.selection import choose

    model = toy("qwen3_moe")
    plan = choose(random_importance(model), model, removed_fraction=0.1, scope="heads", heads_removed=2)
    assert surgery.remove(model, plan).config.num_attention_heads == 2
    with pytest.raises(ValueError, match="sizes the neurons of experts"):
        choose(random_importance(model), model, removed_fraction=0.1, scope="neurons")


def test_too_few_experts_for_the_router_and_rows_torch_cannot_multiply_are_refused_before_the_cut():
    model = toy("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="1 experts would stay, every token goes to 2; keep at least 2 of 4"):
        surgery.remove(model, plan_of(model, experts=3), inplace=True)
    with pytest.raises(ValueError, match="multiple of 4"):
        surgery.remove(model, plan_of(model, neurons=3), inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_experts_says_so():
    with pytest.raises(ValueError, match="no experts"):
        expert_surgery.sizes(toy("gemma2"))


def test_a_plan_of_experts_that_cannot_be_is_refused():
    s = expert_surgery.sizes(toy("mixtral"))
    none = torch.zeros(2, 0, dtype=torch.long)
    for experts, neurons in ((torch.tensor([[1, 0], [0, 1]]), torch.zeros(2, 4, 0, dtype=torch.long)),
                             (none, torch.zeros(2, 3, 4, dtype=torch.long)), (torch.tensor([[4], [0]]), none)):
        with pytest.raises(ValueError, match="plan"):
            ExpertPlan(experts, neurons, (none[0], none[0]), s)
