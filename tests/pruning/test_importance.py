"""Every method returns importances for a plan; methods without data ignore the batches."""

import pytest
import torch

from pruning_lib.models import families
from pruning_lib.models.hooks import inputs_to
from pruning_lib.pruning import importance, peak_to_peak, selection
from pruning_lib.pruning.importance import METHODS, Method


@pytest.fixture
def batches(prompts):
    ids = [torch.tensor([p]) for p in prompts]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


@pytest.fixture
def padded(prompts):
    """Return two batches, one of them padded with tokens that are ordinary tokens elsewhere."""
    rows = [p + [77] * (17 - len(p)) for p in prompts[:3]]
    mask = [[1] * len(p) + [0] * (17 - len(p)) for p in prompts[:3]]
    return [{"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)},
            {"input_ids": torch.tensor(prompts[3:]), "attention_mask": torch.ones(1, 9, dtype=torch.long)}]


def inward(block, family, M):
    """Return the input matrices of the neurons; a fused one is split in halves."""
    weights = {path: block.get_submodule(path).weight for path in family.neurons_in}
    return [part for w in weights.values() for part in w.detach().split(M)]


def slow_magnitude(model, sizes):
    """Return the definition, one weight at a time: the L2 norm over all weights of a head or a neuron."""
    family, D = families.FAMILIES[model.config.model_type], sizes.head_width
    heads, neurons = torch.zeros(sizes.blocks, sizes.heads), torch.zeros(sizes.blocks, sizes.neurons)
    for i, block in enumerate(model.get_submodule(family.blocks)):
        queries, out, closing = (block.get_submodule(p).weight.detach()
                                 for p in (family.queries, family.heads_out, family.neurons_out))
        for h in range(sizes.heads):
            own = range(h * D, (h + 1) * D)
            heads[i, h] = torch.cat([*(queries[row] for row in own), *(out[:, column] for column in own)]).norm()
        for m in range(sizes.neurons):
            rows = [w[m] for w in inward(block, family, sizes.neurons)]
            neurons[i, m] = torch.cat([*rows, closing[:, m]]).norm()
    return heads, neurons


@pytest.mark.parametrize("method", METHODS)
def test_a_method_scores_every_head_and_neuron_and_its_rule_makes_a_plan(family, tiny, batches, method):
    model = tiny(family, neurons=40, dtype=torch.bfloat16)
    s = families.sizes(model)
    found = importance.importances([method], model, batches)[method]
    assert (found.heads.shape, found.neurons.shape) == ((s.blocks, s.heads), (s.blocks, s.neurons))
    assert found.heads.dtype == found.neurons.dtype == torch.float32
    assert found.made_with["method"] and METHODS[method].about
    plan = selection.choose(found, model, removed_fraction=0.2, rule=METHODS[method].rule, heads_removed="same_share")
    assert abs(plan.removed_parameters - 0.2 * s.parameters) <= s.blocks * s.neuron_parameters
    assert plan.neurons.shape[1] > 0


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_magnitude_equals_the_slow_norm(family, tiny, heads, groups):
    model = tiny(family, heads=heads, groups=groups)
    found = importance.magnitude(model)
    slow = slow_magnitude(model, families.sizes(model))
    torch.testing.assert_close((found.heads, found.neurons), slow, rtol=1e-5, atol=0)


def slow_inputs(model, path, batches):
    """Return the inputs of layer ``path`` of every block: (tokens, columns) float64, prompt by prompt, no padding."""
    found = []
    for block in families.blocks(model):
        seen = []
        with inputs_to([block.get_submodule(path)], lambda _, x, seen=seen: seen.append(x[0].double())):
            for batch in batches:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    with torch.no_grad():
                        model(ids[:int(mask.sum())][None])
        found.append(torch.cat(seen))
    return found


def slow_scores(model, batches, score):
    """Return ``score(x (tokens, columns), weight (C, columns))`` for the columns of one unit at a time."""
    family, D, result = families.family_of(model), families.head_width(model), []
    for path, width in ((family.heads_out, D), (family.neurons_out, 1)):
        units = []
        for x, block in zip(slow_inputs(model, path, batches), families.blocks(model), strict=True):
            w = block.get_submodule(path).weight.detach().double()
            units.append([score(x[:, i:i + width], w[:, i:i + width]) for i in range(0, w.shape[1], width)])
        result.append(torch.tensor(units))
    return result


SLOW = {
    "activation_norm": lambda x, w: x.pow(2).sum(1).mean().sqrt(),
    "wanda": lambda x, w: sum((w[:, j].abs() * x[:, j].norm()).mean() for j in range(w.shape[1])) / len(x) ** 0.5,
    "flap": lambda x, w: sum((x[:, j].var() * w[:, j].norm() ** 2) ** (1 if w.shape[1] == 1 else 2)  # heads: squares
                             for j in range(w.shape[1])),
}


@pytest.mark.parametrize("method", SLOW)
def test_scores_from_activations_equal_the_definition_on_all_tokens(family, tiny, padded, method):
    model = tiny(family, heads=6, groups=2)
    found = METHODS[method].importance(model, padded)
    slow = slow_scores(model, padded, SLOW[method])
    torch.testing.assert_close([found.heads, found.neurons], [s.float() for s in slow], rtol=1e-4, atol=1e-6)
    assert found.made_with["tokens"] == 5 + 17 + 1 + 9


def test_the_range_score_equals_its_definition_one_neuron_and_one_prompt_at_a_time(family, tiny, padded):
    model = tiny(family, heads=6, groups=2)
    record, s = families.family_of(model), families.sizes(model)
    found = METHODS["peak_to_peak"].importance(model, padded)
    for path, D, scores in ((record.heads_out, s.head_width, found.heads), (record.neurons_out, 1, found.neurons)):
        alone = [slow_inputs(model, path, [{k: v[i:i + 1] for k, v in b.items()}]) for b in padded
                 for i in range(len(b["input_ids"]))]
        for i, block in enumerate(families.blocks(model)):
            out = block.get_submodule(path).weight.detach().double()  # (C, columns)
            into = [block.get_submodule(record.queries).weight.detach().double()[:out.shape[1]]] if D > 1 else [
                w.double() for w in inward(block, record, s.neurons)]
            ranges = [[max(v) + abs(min(v)) for v in vectors] for vectors in (*into, out.T)]
            shares = sum(torch.tensor(r) / max(r) for r in ranges)
            slow = (shares * sum(x[i].norm(dim=0) for x in alone)).view(-1, D).sum(1)
            torch.testing.assert_close(scores[i], slow.float(), rtol=1e-4, atol=1e-6)


def test_the_range_score_of_neurons_is_that_of_optipfair(tiny, batches):
    """Their library, where it is installed, on prompts that come one at a time."""
    theirs = pytest.importorskip("optipfair.pruning.mlp_glu")
    model = tiny("llama")
    handles = theirs.setup_mlp_hooks_for_importance(model, torch.device("cpu"))
    theirs.run_calibration_forward_passes(model, batches, torch.device("cpu"), show_progress=False)
    norms = theirs.get_activation_norms()
    for handle in handles:
        handle.remove()
    expected = [theirs.compute_neuron_pair_importance_maw_hybrid(
        b.mlp.gate_proj.weight, b.mlp.up_proj.weight, b.mlp.down_proj.weight, norms[i])
        for i, b in enumerate(families.blocks(model))]
    torch.testing.assert_close(peak_to_peak.importance(model, batches).neurons, torch.stack(expected))


def slow_taylor(model, batches):
    """Return the first-order change of the loss, one weight at a time, from gradients of plain autograd."""
    s, family, D = families.sizes(model), families.family_of(model), families.head_width(model)
    prompts = [ids[mask.bool()] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    total = 0
    for ids in (ids for ids in prompts if len(ids) > 1):
        logits = model(ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[1:]) / 3
    gradients = dict(zip([n for n, _ in model.named_parameters()],
                         torch.autograd.grad(total, list(model.parameters())), strict=True))
    heads, neurons = torch.zeros(s.blocks, s.heads), torch.zeros(s.blocks, s.neurons)
    for i, block in enumerate(families.blocks(model)):
        def lost(path, i=i, block=block):
            return (block.get_submodule(path).weight * gradients[f"{family.blocks}.{i}.{path}.weight"]).detach().abs()

        for h in range(s.heads):
            own = slice(h * D, (h + 1) * D)
            heads[i, h] = lost(family.queries)[own].sum() + lost(family.heads_out)[:, own].sum()
        for m in range(s.neurons):
            inward = [part[m].sum() for p in set(family.neurons_in) for part in lost(p).split(s.neurons)]
            neurons[i, m] = sum(inward) + lost(family.neurons_out)[:, m].sum()
    return heads, neurons


def test_taylor_equals_weight_times_gradient_summed_one_unit_at_a_time(family, tiny, padded):
    model = tiny(family, heads=6, groups=2)
    model.lm_head.weight.requires_grad_(False)
    model.get_input_embeddings().weight.grad = given = torch.ones_like(model.get_input_embeddings().weight)
    found = METHODS["taylor"].importance(model, padded)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen in (["lm_head.weight"], ["model.embed_tokens.weight"])  # the second where they are tied
    assert [p.grad for p in model.parameters() if p.grad is not None] == [given]
    model.requires_grad_(True)
    torch.testing.assert_close((found.heads, found.neurons), slow_taylor(model, padded), rtol=1e-4, atol=1e-7)
    assert found.made_with["prompts"] == 3  # of four, one has a single token and nothing to predict


@pytest.mark.parametrize("method", ["taylor", *SLOW])
def test_prompts_that_say_nothing_are_refused(tiny, method):
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    with pytest.raises(ValueError, match="at least one"):
        METHODS[method].importance(tiny("llama"), [batch])


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
        return importance.uniform(model)

    def other(model, given):
        calls.append(-len(list(given)))
        return importance.uniform(model)

    for name, function in (("first", measure), ("second", measure), ("third", other)):
        monkeypatch.setitem(METHODS, name, Method(function, "lowest", "for this test"))
    model = tiny("llama")
    found = importance.importances((name for name in ("first", "third", "second")), model, iter(batches))
    assert list(found) == ["first", "third", "second"] and found["first"] is found["second"]
    assert calls == [4, -4]  # each method received every batch, although the batches are a generator
    assert METHODS["amp"].importance is METHODS["highest"].importance


def test_an_unknown_method_is_refused_before_anything_is_measured(tiny, monkeypatch):
    measured = []
    monkeypatch.setitem(METHODS, "slow", Method(lambda *_: measured.append(1), "lowest", "for this test"))
    with pytest.raises(ValueError, match="unknown method 'largest'; known: .*amp, .*highest, magnitude, .*random"):
        importance.importances(["slow", "largest"], tiny("llama"), [])
    assert not measured


def test_the_reversed_control_removes_none_of_what_amp_removes(tiny, batches):
    model = tiny("llama", neurons=40)
    scores = importance.importances(["amp", "highest"], model, batches)
    lowest, highest = (selection.choose(scores[m], model, removed_fraction=0.2, rule=METHODS[m].rule,
                                        heads_removed="same_share")
                       for m in ("amp", "highest"))
    for i in range(2):
        gone, stay = set(lowest.neurons[i].tolist()), set(highest.neurons[i].tolist())
        assert len(gone) == len(stay) and not gone & stay
        kept = set(range(40)) - gone
        assert max(scores["amp"].neurons[i, j] for j in gone) < min(scores["amp"].neurons[i, j] for j in kept)


def test_random_removes_other_parts_with_another_seed_and_the_same_with_the_same(tiny):
    model = tiny("llama", heads=8, groups=8, neurons=40)
    drawn = [selection.choose(importance.uniform(model), model, removed_fraction=0.3, rule=METHODS["random"].rule,
                              seed=seed, heads_removed="same_share")
             for seed in (0, 0, 1)]
    for part in ("heads", "neurons"):
        first, again, other = (getattr(plan, part) for plan in drawn)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])  # each block draws its own
    assert drawn[0].kept == drawn[2].kept
