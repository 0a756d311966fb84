"""Blocks removed at any place: the config follows, whether it lists, counts or names blocks; or the cut is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning_lib.models import expert_surgery, families, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.models.hooks import skip_block
from pruning_lib.models.toy_models import toy

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])
# type -> sizes of its toy network: blocks before experts, after them, in turn with them, listed, in periods
FOLLOW = {
    "deepseek_v3": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 2, "layer_types": ["conv", "full_attention", "conv"]},
    "qwen2_moe": {"num_hidden_layers": 4, "mlp_only_layers": [1, 2], "layer_types": ["full_attention"] * 4},
    "ernie4_5_moe": {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "llama4_text": {"num_hidden_layers": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0],
                    "layer_types": ["chunked_attention"] * 3 + ["full_attention"]},
    "afmoe": {"num_hidden_layers": 3, "num_dense_layers": 1,
              "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "jamba": {"num_hidden_layers": 2},
    "mixtral": {"num_hidden_layers": 3},
    "openai-gpt": {"n_layer": 3},
}
# type -> what differs by place in a way that no config describes
FIXED = {"diffllama": "lambda_init", "modernbert-decoder": "attn_norm", "beam": "attn_residual_add_idx"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def with_experts(model):
    """Return the numbers of the blocks that hold a tensor with one slice per expert."""
    return tuple(i for i, block in enumerate(families.blocks(model)) if any(p.ndim == 3 and "conv" not in name
                                                                            for name, p in block.named_parameters()))


@pytest.mark.parametrize("name", FOLLOW)
def test_any_block_can_go_and_the_checkpoint_loads_plainly(name, tmp_path):
    model = toy(name, **FOLLOW[name])
    before = model.config.to_dict()
    for i, info in enumerate(families.residual_blocks(model)):
        with skip_block(model, info.name):
            expected = logits(model)
        pruned = surgery.remove(model, BlockPlan.of(model, [info.name]))
        assert torch.equal(logits(pruned), expected) and not torch.equal(expected, logits(model)), i
        pruned.save_pretrained(tmp_path / str(i))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / str(i))), expected), i
        found = families.family_of(pruned)
        assert (found.experts.blocks if found.experts else ()) == with_experts(pruned), i
    assert model.config.to_dict() == before


def test_experts_behind_a_removed_block_are_cut_where_they_are_now(tmp_path):
    model = toy("deepseek_v3", **FOLLOW["deepseek_v3"])
    short = surgery.remove(model, BlockPlan.of(model, ["model.layers.1", "model.layers.2"]))
    s, experts = expert_surgery.sizes(short), expert_surgery.tried(short, experts_too=True)
    assert s.blocks == (1,) and len(s.plain) == 2
    plan = ExpertPlan(torch.tensor([[2]]), torch.zeros(1, s.experts, 0, dtype=torch.long),
                      tuple(torch.zeros(0, dtype=torch.long) for _ in s.plain), s)
    masked = copy.deepcopy(short)
    with expert_surgery.masked_routers({1: (families.blocks(masked)[1], plan.experts[0])}, experts):
        expected = logits(masked)
    cut = surgery.remove(short, plan)
    torch.testing.assert_close(logits(cut), expected, rtol=1e-4, atol=1e-5)
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(cut))


@pytest.mark.parametrize(("name", "reason"), FIXED.items())
def test_a_block_whose_removal_no_config_describes_is_refused_before_the_cut(name, reason):
    model = toy(name)
    first, last = (info.name for info in families.residual_blocks(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"without the blocks 0 .*no config describes it: block 1 .*{reason}"):
        surgery.remove(model, BlockPlan.of(model, [first]), inplace=True)
    assert model.state_dict().keys() == before.keys() and len(families.blocks(model)) == 2
    assert len(families.blocks(surgery.remove(model, BlockPlan.of(model, [last])))) == 1
