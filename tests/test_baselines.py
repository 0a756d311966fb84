"""Every method turns a model into importances that make a plan, and those that do not look at data do not."""

import pytest
import torch

from pruning_lib import baselines, families, plans
from pruning_lib.baselines import METHODS, Method


@pytest.fixture
def batches(prompts):
    ids = [torch.tensor([p]) for p in prompts]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def slow_magnitude(model, sizes):
    """The definition, one weight at a time: L2 norm over everything that goes with a head or a neuron."""
    family, D = families.FAMILIES[model.config.model_type], sizes.head_width
    heads, neurons = torch.zeros(sizes.blocks, sizes.heads), torch.zeros(sizes.blocks, sizes.neurons)
    for i, block in enumerate(model.get_submodule(family.blocks)):
        queries, out, closing = (block.get_submodule(p).weight.detach()
                                 for p in (family.queries, family.heads_out, family.neurons_out))
        for h in range(sizes.heads):
            own = range(h * D, (h + 1) * D)
            heads[i, h] = torch.cat([*(queries[row] for row in own), *(out[:, column] for column in own)]).norm()
        for m in range(sizes.neurons):
            rows = [block.get_submodule(p).weight.detach()[m] for p in family.neurons_in]
            neurons[i, m] = torch.cat([*rows, closing[:, m]]).norm()
    return heads, neurons


@pytest.mark.parametrize("method", METHODS)
def test_a_method_scores_every_head_and_neuron_and_its_rule_makes_a_plan(family, tiny, batches, method):
    model = tiny(family, neurons=40, dtype=torch.bfloat16)
    s = families.sizes(model)
    found = baselines.importances([method], model, batches)[method]
    assert (found.heads.shape, found.neurons.shape) == ((s.blocks, s.heads), (s.blocks, s.neurons))
    assert found.heads.dtype == found.neurons.dtype == torch.float32
    assert found.made_with["method"] and METHODS[method].about
    plan = plans.choose(found, model, removed_fraction=0.2, rule=METHODS[method].rule)
    assert abs(plan.removed_parameters - 0.2 * s.parameters) <= s.blocks * s.neuron_parameters
    assert plan.neurons.shape[1] > 0


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_magnitude_equals_the_slow_norm(family, tiny, heads, groups):
    model = tiny(family, heads=heads, groups=groups)
    found = baselines.magnitude(model)
    slow = slow_magnitude(model, families.sizes(model))
    torch.testing.assert_close((found.heads, found.neurons), slow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_method_that_does_not_look_at_data_runs_no_model_and_needs_no_batch(tiny, batches, method):
    model = tiny("llama")
    looked = []
    model.register_forward_pre_hook(lambda *_: looked.append(1))
    with_data = METHODS[method].importance(model, batches)
    without = METHODS[method].importance(model, ())
    assert not looked
    assert torch.equal(with_data.heads, without.heads) and torch.equal(with_data.neurons, without.neurons)


def test_methods_that_share_an_importance_measure_it_once(tiny, batches, monkeypatch):
    calls = []

    def measure(model, given):
        calls.append(len(list(given)))
        return baselines.nothing(model)

    def other(model, given):
        calls.append(-len(list(given)))
        return baselines.nothing(model)

    for name, function in (("first", measure), ("second", measure), ("third", other)):
        monkeypatch.setitem(METHODS, name, Method(function, "lowest", "for this test"))
    model = tiny("llama")
    found = baselines.importances((name for name in ("first", "third", "second")), model, iter(batches))
    assert list(found) == ["first", "third", "second"] and found["first"] is found["second"]
    assert calls == [4, -4]  # each saw every batch, although they came as a stream
    assert METHODS["amp"].importance is METHODS["highest"].importance


def test_an_unknown_method_is_refused_before_anything_is_measured(tiny, monkeypatch):
    measured = []
    monkeypatch.setitem(METHODS, "slow", Method(lambda *_: measured.append(1), "lowest", "for this test"))
    with pytest.raises(ValueError, match="unknown method 'largest'; known: amp, highest, magnitude, random"):
        baselines.importances(["slow", "largest"], tiny("llama"), [])
    assert not measured


def test_the_reversed_control_removes_none_of_what_amp_removes(tiny, batches):
    model = tiny("llama", neurons=40)
    scores = baselines.importances(["amp", "highest"], model, batches)
    lowest, highest = (plans.choose(scores[m], model, removed_fraction=0.2, rule=METHODS[m].rule)
                       for m in ("amp", "highest"))
    for i in range(2):
        gone, stay = set(lowest.neurons[i].tolist()), set(highest.neurons[i].tolist())
        assert len(gone) == len(stay) and not gone & stay
        kept = set(range(40)) - gone
        assert max(scores["amp"].neurons[i, j] for j in gone) < min(scores["amp"].neurons[i, j] for j in kept)


def test_random_removes_other_parts_with_another_seed_and_the_same_with_the_same(tiny):
    model = tiny("llama", heads=8, groups=8, neurons=40)
    drawn = [plans.choose(baselines.nothing(model), model, removed_fraction=0.3, rule=METHODS["random"].rule, seed=seed)
             for seed in (0, 0, 1)]
    for part in ("heads", "neurons"):
        first, again, other = (getattr(plan, part) for plan in drawn)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])  # each block draws its own
    assert drawn[0].kept == drawn[2].kept
