"""Kept columns equal plain least squares on all activations, and the checkpoint loads in plain transformers."""

import copy

import pytest
import torch
from conftest import hooks_of
from test_surgery import random_plan

from pruning_lib.models import checkpoints, families, surgery
from pruning_lib.models.hooks import inputs_to
from pruning_lib.models.plan import GROUPED
from pruning_lib.models.toy_models import toy
from pruning_lib.pruning import amp, importance, least_squares, reconstruction


@pytest.fixture
def batches():
    """Return three padded batches of 160 tokens, more than a tiny projection has columns."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for lengths in ((30, 20, 9), (40, 11), (25, 25)):
        ids = torch.randint(3, 128, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        found.append({"input_ids": ids, "attention_mask": mask.long()})
    return found


def inputs(model, layer, batches):
    """Return the inputs of one layer, (tokens, columns), without padding, by a plain hook."""
    seen = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            with torch.no_grad(), inputs_to([layer], lambda _, x: seen.append(x.reshape(-1, x.shape[-1]))):
                model(ids[mask.bool()][None], use_cache=False)
    return torch.cat(seen)


def layers(model):
    """Return (block number, of heads?, layer) of every output projection, in forward order."""
    family = families.family_of(model)
    return [(i, path == family.heads_out, block.get_submodule(path)) for i, block in enumerate(families.blocks(model))
            for path in (family.heads_out, family.neurons_out) if path]


def lost_columns(plan, i, heads):
    D = plan.sizes.head_width
    return [h * D + j for h in plan.removed_heads[i].tolist() for j in range(D)] if heads else plan.neurons[i].tolist()


def behind(model, i, heads, batches):
    """Return the residual stream after the heads or the neurons of block i, (tokens, channels), without padding."""
    family, block = families.family_of(model), families.blocks(model)[i]
    added = []
    with block.get_submodule(family.heads_out).register_forward_hook(lambda _, args, y: added.append(y[0])):
        stream = inputs(model, block, batches)
    if heads:
        return stream + getattr(model.config, "residual_multiplier", 1.0) * torch.cat(added)
    left = []
    with block.register_forward_hook(lambda _, args, y: left.append(y[0])):
        inputs(model, block, batches)
    return torch.cat(left)


def slow(model, plan, batches, *, ridge, mode):
    """Return a masked copy with each projection solved by lstsq on its inputs, the ridge as extra equations."""
    work = copy.deepcopy(model)
    for (i, heads, layer), (_, _, whole) in zip(layers(work), layers(model), strict=True):
        columns = lost_columns(plan, i, heads)
        if columns:
            x = inputs(model, whole, batches) if mode == "one_pass" else inputs(work, layer, batches)
            y = layer(x).detach()
            if mode == "asymmetric":
                lacking = behind(model, i, heads, batches) - behind(work, i, heads, batches)
                y += lacking / getattr(model.config, "residual_multiplier", 1.0)
            stays = [j for j in range(x.shape[1]) if j not in columns]
            weight = families.matrix(layer).detach()  # a view: GPT-2 stores it the other way round
            kept, w, mean = x[:, stays], weight[:, stays].clone(), y.mean(0)
            if layer.bias is not None:
                y, kept = y - y.mean(0), kept - kept.mean(0)
            pull = (ridge * kept.pow(2).sum(0).mean()).sqrt()
            left = torch.cat([kept, pull * torch.eye(len(stays), dtype=x.dtype)])
            solved = torch.linalg.lstsq(left, torch.cat([y, pull * w.T]), driver="gelsd").solution.T
            weight.zero_()[:, stays] = solved
            if layer.bias is not None:
                layer.bias.data = mean - x.mean(0) @ weight.T
    return work


@pytest.mark.parametrize(("cut", "ridge"), zip(GROUPED, (0.0, 0.03), strict=True))
@pytest.mark.parametrize("mode", reconstruction.MODES)
def test_equals_least_squares_on_the_stacked_activations(family, tiny, batches, cut, ridge, mode):
    model = tiny(family, heads=6, groups=3, dtype=torch.float64)
    plan = random_plan(model, cut, units=1, neurons=9)
    pruned, reconstructions = reconstruction.reconstruct(model, plan, batches, ridge=ridge, mode=mode, progress=False)
    expected = surgery.remove(slow(model, plan, batches, ridge=ridge, mode=mode), plan)
    for (_, _, found), (_, _, wanted) in zip(layers(pruned), layers(expected), strict=True):
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.bias, wanted.bias, rtol=1e-6, atol=1e-8)
    assert [r.layer for r in reconstructions] == [
        f"{families.family_of(model).blocks}.{i}.{path}" for i in range(2) for path in (
        families.family_of(model).heads_out, families.family_of(model).neurons_out)]


@pytest.mark.parametrize("mode", ["one_pass", "sequential"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "opt", "olmo2", "gptj", "bart"])
def test_families_found_from_their_shapes_are_solved_as_well(name, batches, mode):
    """Among them one that adds its heads to its neurons in place (Falcon), and one that norms what it adds (OLMo 2)."""
    model = toy(name, vocab_size=128).double()
    plan = random_plan(model, "whole_groups", units=0, neurons=9)
    pruned, _ = reconstruction.reconstruct(model, plan, batches, ridge=0.03, mode=mode, progress=False)
    expected = surgery.remove(slow(model, plan, batches, ridge=0.03, mode=mode), plan)
    for (_, _, found), (_, _, wanted) in zip(layers(pruned), layers(expected), strict=True):
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-6, atol=1e-7)
        if wanted.bias is not None:
            torch.testing.assert_close(found.bias, wanted.bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["cpmant", "prophetnet", "xlnet"])
def test_a_family_that_adds_tokens_of_its_own_or_orders_them_otherwise_is_refused_with_the_way_out(name, batches):
    model = toy(name, vocab_size=128)
    plan = random_plan(model, "whole_groups", units=0, neurons=9)
    for measure in (lambda: amp.importance(model, batches, progress=False),
                    lambda: importance.METHODS["wanda"].importance(model, batches),
                    lambda: reconstruction.reconstruct(model, plan, batches, progress=False)):
        with pytest.raises(ValueError, match="tokens of its own.*'magnitude'"):
            measure()
    assert importance.METHODS["magnitude"].importance(model, batches).neurons.shape == (2, 24)


@pytest.mark.parametrize("name", ["falcon", "gpt_neox", "olmo2"])
def test_what_is_not_simply_added_to_the_stream_is_not_aimed_at(name, batches):
    model = toy(name, vocab_size=128).double()
    plan = random_plan(model, "whole_groups", units=0, neurons=9)
    with pytest.raises(ValueError, match="use 'sequential'"):
        reconstruction.reconstruct(model, plan, batches, mode="asymmetric", progress=False)


@pytest.mark.parametrize("mode", reconstruction.MODES)
def test_a_llama_with_biases_is_solved_around_the_mean(tiny, batches, mode):
    model = tiny("llama", heads=6, groups=6, n_blocks=3, dtype=torch.float64,
                 fields={"attention_bias": True, "mlp_bias": True})
    plan = random_plan(model, "whole_groups", units=2, neurons=9)
    pruned, _ = reconstruction.reconstruct(model, plan, batches, ridge=0.1, mode=mode, progress=False)
    expected = surgery.remove(slow(model, plan, batches, ridge=0.1, mode=mode), plan)
    for (_, _, found), (_, _, wanted) in zip(layers(pruned), layers(expected), strict=True):
        torch.testing.assert_close((found.weight, found.bias), (wanted.weight, wanted.bias), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", reconstruction.MODES)
def test_without_a_pull_the_error_on_the_calibration_text_never_grows(family, tiny, batches, mode):
    model = tiny(family, heads=6, groups=3, dtype=torch.float64)
    plan = random_plan(model, "equal_queries", units=1, neurons=9)
    _, reconstructions = reconstruction.reconstruct(model, plan, batches, ridge=0.0, mode=mode, progress=False)
    assert all(0 < r.error < r.cut_error for r in reconstructions)
    _, pulled = reconstruction.reconstruct(model, plan, batches, ridge=1e9, mode=mode, progress=False)
    for (_, _, layer), r in zip(layers(model), pulled, strict=True):  # a large ridge: a plain cut, except for biases
        assert (r.error < r.cut_error) if layer.bias is not None else r.error == pytest.approx(r.cut_error, rel=1e-6)


def test_the_errors_are_shares_of_the_output_in_sums_of_squares(tiny, batches):
    model = tiny("phi", heads=6, groups=3, dtype=torch.float64)
    plan = random_plan(model, "whole_groups", units=1, neurons=9)
    pruned, reconstructions = reconstruction.reconstruct(model, plan, batches, ridge=0.1, mode="one_pass",
                                                         progress=False)
    for (i, heads, layer), (_, _, now), repair in zip(layers(model), layers(pruned), reconstructions, strict=True):
        x = inputs(model, layer, batches)
        stays = [j for j in range(x.shape[1]) if j not in lost_columns(plan, i, heads)]
        whole = (x @ layer.weight.T).pow(2).sum()
        lost = x @ layer.weight.T - x[:, stays] @ layer.weight[:, stays].T
        assert repair.cut_error == pytest.approx((lost.pow(2).sum() / whole).item(), rel=1e-8)
        assert repair.error == pytest.approx(((layer(x) - now(x[:, stays])).pow(2).sum() / whole).item(), rel=1e-8)


def test_aiming_at_the_dense_stream_comes_closer_to_it_than_any_other_mode(family, tiny, batches):
    model = tiny(family, heads=6, groups=3, n_blocks=4, dtype=torch.float64)
    plan = random_plan(model, "whole_groups", units=1, neurons=9)
    wanted, last = behind(model, 3, False, batches), {}
    for mode in reconstruction.MODES:
        pruned, reconstructions = reconstruction.reconstruct(model, plan, batches, ridge=1e-6, mode=mode,
                                                             progress=False)
        found = behind(pruned, 3, False, batches)
        last[mode] = (found - wanted).pow(2).sum().item()
    assert last["asymmetric"] < min(last["one_pass"], last["sequential"])
    _, _, down = layers(pruned)[-1]
    said = inputs(model, layers(model)[-1][2], batches) @ layers(model)[-1][2].weight.T
    whole = (getattr(model.config, "residual_multiplier", 1.0) * said).pow(2).sum().item()
    assert reconstructions[-1].layer.endswith(families.family_of(model).neurons_out) and down.in_features < 64
    assert reconstructions[-1].error == pytest.approx(last["asymmetric"] / whole, rel=0.5)  # relative errors


def test_a_block_that_scales_what_it_adds_is_not_aimed_at(tiny, batches):
    model = tiny("llama")
    plan = random_plan(model, "whole_groups", units=1, neurons=5)
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda _, args, y: (0.2 * y[0], *y[1:]))
    with pytest.raises(ValueError, match="use 'sequential'"):
        reconstruction.reconstruct(model, plan, batches, mode="asymmetric", progress=False)
    reconstruction.reconstruct(model, plan, batches, progress=False)


def duplicated(model, *, heads, neurons):
    """Make parts linear combinations of others: head ``a`` reads as ``b`` does; neuron ``a`` is twice neuron ``b``."""
    family, D = families.family_of(model), families.head_width(model)
    for block in families.blocks(model):
        p = families.projections(block, family)
        for a, b in heads:
            for rows in (p.queries, p.keys, p.values):
                weight = rows.of(rows.linear.weight.data)
                weight[a * D:(a + 1) * D] = weight[b * D:(b + 1) * D]
        for a, b in neurons:
            gate, up = (rows.of(rows.linear.weight.data) for rows in p.neurons_in)
            gate[a], up[a] = gate[b], 2 * up[b]
    return model


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_a_part_that_is_a_combination_of_kept_ones_goes_without_a_trace(tiny, batches, name, ridge):
    model = duplicated(tiny(name, heads=4, groups=4, dtype=torch.float64), heads=[(1, 3)], neurons=[(5, 2), (20, 2)])
    plan = reconstruction.Plan("whole_groups", torch.tensor([[1], [1]]), torch.tensor([[5, 20], [5, 20]]),
                           families.sizes(model))
    pruned, reconstructions = reconstruction.reconstruct(model, plan, batches, ridge=ridge, progress=False)
    unseen = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        torch.testing.assert_close(pruned(unseen).logits, model(unseen).logits, rtol=1e-4, atol=1e-5)
        assert (surgery.remove(model, plan)(unseen).logits - model(unseen).logits).abs().max() > 0.1
    assert all(r.error < 1e-9 < 1e-3 < r.cut_error for r in reconstructions)


def test_a_ridge_is_chosen_per_projection_on_text_that_is_not_fitted(tiny, batches):
    """Recompute the error on the held-out batch: it is the least of all ridges for every projection."""
    model = tiny("llama", heads=6, groups=3, neurons=60, dtype=torch.float64)
    plan, ridges = random_plan(model, "whole_groups", units=1, neurons=30), (0.0, 0.01, 0.1, 1.0, 10.0)
    fit, held = [batches[0], batches[2]], [batches[1]]
    pruned, reconstructions = reconstruction.reconstruct(model, plan, batches, ridge=ridges, mode="one_pass",
                                                         progress=False)
    tried = {r: reconstruction.reconstruct(model, plan, fit, ridge=r, mode="one_pass", progress=False)[0]
             for r in ridges}
    for n, ((i, heads, layer), repair) in enumerate(zip(layers(model), reconstructions, strict=True)):
        x = inputs(model, layer, held)
        stays = [j for j in range(x.shape[1]) if j not in lost_columns(plan, i, heads)]
        errors = {r: (layer(x) - layers(m)[n][2](x[:, stays])).pow(2).sum().item() for r, m in tried.items()}
        assert repair.ridge == min(errors, key=errors.get)
        assert torch.equal(layers(pruned)[n][2].weight, layers(tried[repair.ridge])[n][2].weight)
    assert len({r.ridge for r in reconstructions}) > 1


@pytest.mark.parametrize("mode", ["sequential", "asymmetric"])
def test_neurons_kept_for_the_next_block_replace_a_second_run_bit_for_bit(family, tiny, batches, mode, monkeypatch):
    model = tiny(family, heads=6, groups=3, n_blocks=3, dtype=torch.float32)
    plan = random_plan(model, "whole_groups", units=1, neurons=9)
    kept, _ = reconstruction.reconstruct(model, plan, batches, mode=mode, progress=False)
    monkeypatch.setattr(reconstruction, "ROOM", 0)
    run_again, _ = reconstruction.reconstruct(model, plan, batches, mode=mode, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), run_again.parameters(), strict=True))


def test_a_gram_matrix_in_panels_is_the_whole_product():
    layer, x = torch.nn.Linear(500, 3), torch.randn(70, 500, generator=torch.Generator().manual_seed(0))
    sums = least_squares.GramAccumulator(layer)
    for part in x.split(32):
        sums.add(part)
    found = sums.gram().square
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_padding_and_batching_do_not_matter(family, tiny, batches):
    model = tiny(family, heads=6, groups=3, dtype=torch.float64)
    plan = random_plan(model, "whole_groups", units=1, neurons=9)
    rows = [(ids[mask.bool()][None]) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"],
                                                                         strict=True)]
    alone = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    first, again = (reconstruction.reconstruct(model, plan, given, ridge=0.1, progress=False)[0]
                    for given in (batches, iter(alone)))
    for (_, _, a), (_, _, b) in zip(layers(first), layers(again), strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cut", GROUPED)
def test_the_checkpoint_stays_plain(family, tiny, batches, cut, tmp_path):
    model = tiny(family, heads=6, groups=3, dtype=torch.bfloat16)
    plan = random_plan(model, cut, units=1, neurons=9)
    pruned, _ = reconstruction.reconstruct(model, plan, batches, ridge=(0.01, 0.1), progress=False)
    assert pruned.dtype == torch.bfloat16 and families.sizes(pruned) == families.sizes(surgery.remove(model, plan))
    checkpoints.save(pruned, None, tmp_path / "stored")  # reloads with plain transformers and compares bit for bit


def test_the_model_itself_stays_as_it_is(family, tiny, batches):
    model = tiny(family).train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    plan = random_plan(model, "whole_groups", units=1, neurons=5)
    pruned, _ = reconstruction.reconstruct(model, plan, batches, progress=False)
    reconstruction.reconstruction_error(model, batches, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and not hooks_of(model) and not hooks_of(pruned)
    assert not [m for part in (model, pruned) for m in part.modules() if "forward" in vars(m)]
    assert all(p.requires_grad and not p.is_inference() for p in pruned.parameters())
    pruned(batches[0]["input_ids"], labels=batches[0]["input_ids"]).loss.backward()  # still learns


def test_a_score_is_the_error_that_least_squares_leaves(family, tiny, batches):
    """Refit without each head, and without neurons one after the other, and compare the errors."""
    model = tiny(family, heads=4, groups=2, dtype=torch.float64)
    found = reconstruction.reconstruction_error(model, batches, ridge=1e-12, progress=False)
    D = families.head_width(model)
    for i, heads, layer in layers(model):
        x = inputs(model, layer, batches)
        centre = x.mean(0) if layer.bias is not None else 0
        x, width, scores = x - centre, D if heads else 1, (found.heads if heads else found.neurons)[i]

        weight = layer.weight.detach()

        def left(units, x=x, width=width, w=weight):
            columns = [u * width + j for u in units for j in range(width)]
            stays = [j for j in range(x.shape[1]) if j not in columns]
            y = x @ w.T
            residual = y - x[:, stays] @ torch.linalg.lstsq(x[:, stays], y).solution
            return residual.pow(2).sum().item() / len(x)

        order = scores.argsort().tolist()
        for n, unit in enumerate(order[:12]):
            expected = left([unit]) if heads else left(order[:n + 1])
            assert scores[unit].item() == pytest.approx(expected, rel=1e-4)
        if not heads:  # each step takes the cheapest of those left
            assert all(left([*order[:3], u]) >= scores[order[3]] * (1 - 1e-6) for u in order[4:10])


def test_of_two_neurons_that_can_stand_in_for_each_other_one_stays():
    """Remove one of each of forty near-identical pairs first, with more columns than are removed per update."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 240, generator=generator, dtype=torch.float64) for n in (2000, 64))
    x[:, 40:80] = x[:, :40] + 0.01 * x[:, 40:80]
    G = x.T @ x
    cost = least_squares.cost_in_turn(G, weight)
    for n in (1, 63, 64, 65, 128, 239, 240):  # the error of plain least squares after this number of removals
        stays = cost.argsort()[n:]
        left = (x - x[:, stays] @ torch.linalg.lstsq(x[:, stays], x).solution) @ weight.T if n < 240 else x @ weight.T
        assert cost.sort().values[n - 1].item() == pytest.approx(left.pow(2).sum().item(), rel=1e-6)
    assert sorted(n % 40 for n in cost.argsort()[:40].tolist()) == list(range(40)) and cost.argsort()[:40].max() < 80
    apart = least_squares.cost_alone(G, weight, 1).argsort()[:40].tolist()
    assert len({n % 40 for n in apart}) < 40  # scored alone, either of two costs nothing, so both would be removed


@pytest.mark.parametrize(("change", "message"), [
    ({"mode": "twice"}, "allowed: one_pass, sequential, asymmetric"), ({"ridge": -1.0}, "0 or larger"),
    ({"ridge": ()}, "one or more"), ({"batches": []}, "0 texts.*at least 2"),
    ({"batches": [], "ridge": 0.1}, "0 texts.*at least 1"),
    ({"batches": 1, "ridge": (0.1, 1.0)}, "1 texts.*at least 2.*held out"),
])
def test_what_cannot_be_solved_is_refused(tiny, batches, change, message):
    model = tiny("llama")
    plan = random_plan(model, "whole_groups", units=1, neurons=5)
    few = [{name: part[:1] for name, part in batch.items()} for batch in batches[:change.get("batches") or 0]]
    given = {"batches": few if "batches" in change else batches}
    with pytest.raises(ValueError, match=message):
        reconstruction.reconstruct(model, plan, **{**change, **given}, progress=False)
    with pytest.raises(ValueError, match="other sizes"):
        reconstruction.reconstruct(surgery.remove(model, plan), plan, batches)


def test_activations_that_are_not_finite_are_refused(tiny, batches):
    model = tiny("llama")
    plan = random_plan(model, "whole_groups", units=1, neurons=5)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    for mode in reconstruction.MODES:
        with pytest.raises(ValueError, match="not finite"):
            reconstruction.reconstruct(model, plan, batches, mode=mode, progress=False)
    with pytest.raises(ValueError, match="not finite"):
        reconstruction.reconstruction_error(model, batches, progress=False)
