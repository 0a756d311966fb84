"""A network without a head width of its own equals the one it is written as, before and after heads are removed."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import pruning_lib as pl
from pruning_lib.models import checkpoints, equivalents, families, possible_cuts, surgery
from pruning_lib.models.plan import Plan
from pruning_lib.models.toy_models import toy

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
OLD = {"new_decoder_architecture": False}
# type, fields of its toy network -> the type it is written as
CASES = {
    "pythia": ("gpt_neox", {}, "phi"),
    "redpajama": ("gpt_neox", {"use_parallel_residual": False}, "nemotron"),
    "japanese": ("gpt_neox_japanese", {}, "nemotron"),
    "gptj": ("gptj", {"rotary_dim": 4}, "phi"),
    "codegen": ("codegen", {}, "phi"),
    "falcon-40b": ("falcon", {}, "phi"),
    "falcon-11b": ("falcon", {"num_ln_in_parallel_attn": 1, "bias": True}, "phi"),
    "falcon-7b": ("falcon", OLD, "phi"),
    "falcon-heads": ("falcon", {**OLD, "multi_query": False, "num_kv_heads": 4, "bias": True}, "phi"),
    "falcon-sequence": ("falcon", {**OLD, "parallel_attn": False}, "nemotron"),
    "helium": ("helium", {}, "mistral"),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.double()


def same(one, other):
    return (one - other).abs().max() < 1e-5 * one.abs().max()


def test_every_type_of_the_table_is_tried():
    assert {name for name, _, _ in CASES.values()} == equivalents.EQUIVALENTS.keys()


@pytest.mark.parametrize("case", CASES)
def test_removing_heads_equals_masking_in_the_network_itself(case, tmp_path):
    name, fields, stored = CASES[case]
    model = toy(name, **fields)
    other = equivalents.with_head_width(model)
    assert other.config.model_type == stored and same(logits(model), logits(other))
    s = families.sizes(other)
    gone = torch.arange(s.groups).roll(1)[:1].expand(s.blocks, 1)
    if s.groups == 1:
        gone = torch.tensor([[[1]]]).expand(s.blocks, 1, 1)
    plan = Plan("whole_groups" if s.groups > 1 else "equal_queries", gone, torch.tensor([[2, 5]] * s.blocks), s)
    expected = logits(masked(model, plan, equivalents.entry(model)))
    pruned = surgery.remove(other, plan)
    assert same(expected, logits(pruned)) and not same(logits(model), expected)
    folder = checkpoints.save(pruned, None, tmp_path / "smaller")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(pruned))


def masked(model, plan, entry):
    """Return a copy whose own output projections have the columns of the removed heads and neurons at zero."""
    model = copy.deepcopy(model)
    for i, block in enumerate(families.blocks(model)):
        heads = (plan.removed_heads[i][:, None] * plan.sizes.head_width + torch.arange(plan.sizes.head_width)).flatten()
        block.get_submodule(entry.heads_out).weight.data[:, heads] = 0
        block.get_submodule(entry.neurons_out).weight.data[:, plan.neurons[i]] = 0
    return model


def test_prune_removes_heads_of_such_a_type_and_neurons_alone_leave_the_type_as_it_is():
    model = toy("gpt_neox")
    found = pl.prune(model, BATCHES, removed_fraction=0.3, heads_removed=1, reconstruction="none")
    assert found.model.config.model_type == "phi" and families.sizes(found.model).heads == 3
    narrow = pl.prune(model, BATCHES, removed_fraction=0.1, reconstruction="none")
    assert narrow.model.config.model_type == "gpt_neox" and model.config.num_attention_heads == 4


def test_a_setting_that_the_other_type_has_no_place_for_is_refused_before_anything_is_measured():
    model = toy("falcon", alibi=True)
    with pytest.raises(ValueError, match="alibi"):
        pl.prune(model, BATCHES, removed_fraction=0.3, heads_removed=1)
    assert "alibi" in possible_cuts.removable(model)["heads"]


def test_sixteen_bits_stay_sixteen_bits():
    model = toy("gpt_neox", dtype=torch.bfloat16)
    other = equivalents.with_head_width(model)
    assert other.dtype == torch.bfloat16
    assert (logits(model) - logits(other)).abs().max() < 0.05 * logits(model).abs().max()


def test_a_type_that_states_its_head_width_stays_as_it_is():
    model = toy("llama")
    assert equivalents.with_head_width(model) is model
