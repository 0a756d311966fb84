"""Removing equals masking: the pruned model computes the same as the dense one with the removed columns at zero."""

import copy

import pytest
import torch

from pruning_lib.models import families, surgery
from pruning_lib.models.plan import GROUPED, Plan
from pruning_lib.pruning.selection import choose

SHAPES = [(4, 4), (4, 2), (6, 3), (6, 2), (4, 1)]  # heads, groups; many heads, grouped, one group


def random_plan(model, cut, *, units, neurons, seed=0):
    """Return a plan with different heads and neurons in every block (and in every group)."""
    s, generator = families.sizes(model), torch.Generator().manual_seed(seed)
    places = (s.blocks, s.groups) if cut == "whole_groups" else (s.blocks, s.groups, s.heads // s.groups)

    def draw(shape, k):
        return torch.rand(shape, generator=generator).argsort(-1)[..., :k].sort(-1).values

    return Plan(cut, draw(places, units), draw((s.blocks, s.neurons), neurons), s)


def masked(model, plan):
    """Return the dense model with removed columns at zero, written without the helpers of ``Plan``."""
    model = copy.deepcopy(model)
    family, D = families.FAMILIES[model.config.model_type], model.config.head_dim
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    for i, block in enumerate(model.get_submodule(family.blocks)):
        if plan.grouped_query == "whole_groups":
            heads = [g * per_group + j for g in plan.heads[i].tolist() for j in range(per_group)]
        else:
            heads = [g * per_group + j for g, places in enumerate(plan.heads[i].tolist()) for j in places]
        for h in heads:
            block.get_submodule(family.heads_out).weight.data[:, h * D:(h + 1) * D] = 0
        block.get_submodule(family.neurons_out).weight.data[:, plan.neurons[i]] = 0
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", GROUPED)
@pytest.mark.parametrize(("heads", "groups"), SHAPES)
def test_removing_equals_masking(family, tiny, ids, cut, heads, groups, attention):
    model = tiny(family, heads=heads, groups=groups, head_width=16, dtype=torch.float64)
    model.set_attn_implementation(attention)
    count = groups if cut == "whole_groups" else heads // groups
    for units in range(count):  # by neurons alone, with the smallest margin
        plan = random_plan(model, cut, units=units, neurons=7, seed=units)
        pruned = surgery.remove(model, plan)
        with torch.no_grad():
            dense, expected, found = (m(ids).logits for m in (model, masked(model, plan), pruned))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert (expected - dense).abs().max() > 1e-3  # the removed parts mattered
        s = families.sizes(pruned)
        gone = units * (heads // groups if cut == "whole_groups" else groups)
        assert (s.heads, s.neurons) == (heads - gone, 24 - 7)
        assert s.groups == (groups - units if cut == "whole_groups" else groups)
        assert s.parameters == families.sizes(model).parameters - plan.removed_parameters


def test_biases_are_cut_along_where_a_llama_has_them(tiny, ids):
    model = tiny("llama", heads=6, groups=6, dtype=torch.float64, fields={"attention_bias": True, "mlp_bias": True})
    plan = random_plan(model, "whole_groups", units=2, neurons=5)
    with torch.no_grad():
        torch.testing.assert_close(surgery.remove(model, plan)(ids).logits, masked(model, plan)(ids).logits,
                                   rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", GROUPED)
def test_the_pruned_model_generates_at_once_with_its_key_value_cache(family, tiny, ids, cut):
    model = tiny(family, heads=6, groups=3, dtype=torch.float64)
    plan = random_plan(model, cut, units=1, neurons=5)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    expected = masked(model, plan).generate(ids, **options)
    assert expected.shape[1] == 17
    assert torch.equal(surgery.remove(model, plan).generate(ids, **options), expected)


def test_the_original_stays_whole_unless_it_is_cut_in_place(family, tiny, ids, random_importance):
    model = tiny(family, heads=6, groups=3)
    plan = choose(random_importance(model), model, removed_fraction=0.25, heads_removed="same_share")
    before, fields = copy.deepcopy(model.state_dict()), model.config.to_dict()
    pruned = surgery.remove(model, plan)
    pruned_logits = pruned(ids).logits
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.config.to_dict() == fields and families.sizes(model) == plan.sizes
    in_place = surgery.remove(model, plan, inplace=True)
    assert in_place is model and torch.equal(model(ids).logits, pruned_logits)


def test_the_config_states_the_new_sizes_and_the_head_width(family, tiny, random_importance):
    model = tiny(family, heads=6, groups=3, head_width=16)
    plan = choose(random_importance(model), model, removed_fraction=0.25, heads_removed=2)
    config = surgery.remove(model, plan).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.intermediate_size == plan.kept["neurons"] < 24


def test_a_plan_for_other_sizes_is_refused_before_anything_is_cut(tiny, random_importance):
    model = tiny("llama", heads=6, groups=3)
    plan = choose(random_importance(model), model, removed_fraction=0.2, heads_removed="same_share")
    other = tiny("llama", heads=6, groups=3, neurons=25)
    pruned = surgery.remove(model, plan)
    for wrong in (other, pruned):
        sizes = families.sizes(wrong)
        with pytest.raises(ValueError, match="other sizes"):
            surgery.remove(wrong, plan, inplace=True)
        assert families.sizes(wrong) == sizes


def test_a_pruned_model_can_be_pruned_again(family, tiny, ids, random_importance):
    model = tiny(family, heads=6, groups=3, dtype=torch.float64)
    once = surgery.remove(model, random_plan(model, "whole_groups", units=1, neurons=6))
    plan = random_plan(once, "equal_queries", units=1, neurons=6, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(surgery.remove(once, plan)(ids).logits, masked(once, plan)(ids).logits,
                                   rtol=1e-10, atol=1e-10)


def test_tied_embeddings_stay_tied_and_frozen_weights_stay_frozen(tiny, random_importance):
    model = tiny("llama", fields={"tie_word_embeddings": True})
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    plan = choose(random_importance(model), model, removed_fraction=0.2, heads_removed="same_share")
    pruned = surgery.remove(model, plan)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert sum(p.numel() for p in pruned.parameters()) == plan.sizes.parameters - plan.removed_parameters
    assert [name for name, p in pruned.named_parameters() if not p.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"]


def test_every_remaining_weight_learns(family, tiny, ids, random_importance):
    model = tiny(family)
    pruned = surgery.remove(model, choose(random_importance(model), model, removed_fraction=0.2,
                                          heads_removed="same_share"))
    pruned(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
