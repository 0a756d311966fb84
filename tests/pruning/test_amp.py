"""AMP's importance equals the slow sum over heads, is independent of batching, and does not change the model."""

import pytest
import torch
from conftest import hooks_of

from pruning_lib import data
from pruning_lib.models import families
from pruning_lib.models.toy_models import toy
from pruning_lib.pruning import amp


def padded(prompts, *, fill=0):
    """Return one batch of all prompts, padded on the right with the token ``fill``."""
    T = max(map(len, prompts))
    return {"input_ids": torch.tensor([p + [fill] * (T - len(p)) for p in prompts]),
            "attention_mask": torch.tensor([[1] * len(p) + [0] * (T - len(p)) for p in prompts])}


def one_at_a_time(prompts):
    return [padded([p]) for p in prompts]


def slow_importance(model, prompts):
    """Return the importance by its definition: one prompt, one block, one head at a time, summed in float64."""
    family, D = families.FAMILIES[model.config.model_type], model.config.head_dim
    blocks = list(model.get_submodule(family.blocks))
    factor = getattr(model.config, "residual_multiplier", 1.0)  # of what is added to the residual stream
    heads = torch.zeros(len(blocks), model.config.num_attention_heads, dtype=torch.float64)
    neurons = torch.zeros(len(blocks), model.config.intermediate_size, dtype=torch.float64)
    for prompt in prompts:
        for i, block in enumerate(blocks):
            seen = {}
            out, closing = block.get_submodule(family.heads_out), block.get_submodule(family.neurons_out)
            handles = [out.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(heads=args[0][0])),
                       closing.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(neurons=args[0][0]))]
            with torch.no_grad():
                model(torch.tensor([prompt]))
            for handle in handles:
                handle.remove()
            x, w = seen["heads"].double(), out.weight.detach().double()  # (T, H*D), (C, H*D)
            for h in range(heads.shape[1]):
                alone = torch.zeros_like(x)
                alone[:, h * D:(h + 1) * D] = x[:, h * D:(h + 1) * D]
                heads[i, h] += factor * (alone @ w.T).abs().sum(1).mean() / len(prompts)
            neurons[i] += seen["neurons"].double().abs().mean(0) / len(prompts)
    return heads, neurons


def assert_close(importance, heads, neurons, *, rtol):
    torch.testing.assert_close(importance.heads.double(), heads, rtol=rtol, atol=0)
    torch.testing.assert_close(importance.neurons.double(), neurons, rtol=rtol, atol=0)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("arranged", ["padded in one batch", "one at a time", "two batches"])
def test_importance_equals_the_slow_sum(family, tiny, prompts, heads, groups, arranged):
    model = tiny(family, heads=heads, groups=groups, head_width=16)
    batches = {"padded in one batch": [padded(prompts)], "one at a time": one_at_a_time(prompts),
               "two batches": [padded(prompts[:3]), padded(prompts[3:])]}[arranged]
    found = amp.importance(model, batches, progress=False)
    assert found.heads.dtype == found.neurons.dtype == torch.float32
    assert found.made_with["prompts"] == 4
    assert_close(found, *slow_importance(model, prompts), rtol=1e-5)


def test_what_stands_in_the_padding_never_counts(family, tiny, prompts):
    model = tiny(family)
    first, second = (amp.importance(model, [padded(prompts, fill=f)], progress=False) for f in (0, 77))
    assert torch.equal(first.heads, second.heads) and torch.equal(first.neurons, second.neurons)


def test_a_mask_of_booleans_or_floats_means_the_same(tiny, prompts):
    model, batch = tiny("llama"), padded(prompts)
    first = amp.importance(model, [batch], progress=False)
    for dtype in (torch.bool, torch.float32):
        again = amp.importance(model, [{**batch, "attention_mask": batch["attention_mask"].to(dtype)}], progress=False)
        torch.testing.assert_close(again.heads, first.heads)


def test_a_bfloat16_model_is_summed_and_averaged_in_float32(family, tiny):
    """Compare with float64 sums of the model's own activations.

    The products are rounded to bfloat16, which averages out over 768 channels; a sum in bfloat16 would be off by 1e-3.
    """
    model = tiny(family, dtype=torch.bfloat16, width=768)
    prompts = [[5], [77, 9], [30, 31, 32]]
    found = amp.importance(model, one_at_a_time(prompts), progress=False)
    heads, neurons = slow_importance(model, prompts)
    assert found.heads.dtype == torch.float32 and found.made_with["dtype"] == "torch.bfloat16"
    torch.testing.assert_close(found.neurons.double(), neurons, rtol=1e-5, atol=0)  # absolute values are exact
    torch.testing.assert_close(found.heads.double(), heads, rtol=2e-4, atol=0)


@pytest.mark.parametrize("first", [[0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
def test_padding_on_the_left_or_in_between_and_empty_prompts_are_refused(tiny, first):
    batch = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.tensor([first, [1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="pad on the right"):
        amp.importance(tiny("llama"), [batch], progress=False)


def test_no_prompts_at_all_are_refused(tiny):
    with pytest.raises(ValueError, match="at least one prompt"):
        amp.importance(tiny("llama"), [], progress=False)


def test_activations_that_are_not_finite_are_refused_with_the_way_out(family, tiny, prompts):
    model = tiny(family)
    model.get_submodule(families.FAMILIES[family].blocks)[1].get_submodule(
        families.FAMILIES[family].values).weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite.*float32 or bfloat16"):
        amp.importance(model, [padded(prompts)], progress=False)
    assert not hooks_of(model)


def test_the_model_is_afterwards_as_it_was(family, tiny, prompts):
    model = tiny(family)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    logits = model(torch.tensor([prompts[1]])).logits
    amp.importance(model, [padded(prompts)], progress=False)
    with pytest.raises(ValueError):
        amp.importance(model, [padded(prompts), {"input_ids": torch.ones(1, 2, dtype=torch.long),
                                                 "attention_mask": torch.tensor([[0, 1]])}], progress=False)
    assert not hooks_of(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    again = model(torch.tensor([prompts[1]])).logits
    assert torch.equal(again, logits) and again.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_batches_hold_every_prompt_once_within_the_budget(tokenizer):
    texts = ["a" * n for n in (3, 40, 8, 8, 25, 1, 13, 100)]
    batches = data.batches(texts, tokenizer, tokens_per_batch=50, max_length=45)
    lengths = [n for b in batches for n in b["attention_mask"].sum(1).tolist()]
    assert lengths == [45, 40, 25, 13, 8, 8, 3, 1]  # the prompt of a hundred tokens was truncated
    assert all(b["input_ids"].numel() <= 50 and b["input_ids"].shape == b["attention_mask"].shape for b in batches)
    a = tokenizer.convert_tokens_to_ids("a")
    assert all(((b["input_ids"] == a) == b["attention_mask"].bool()).all() for b in batches)
    assert len(data.batches(texts, tokenizer, tokens_per_batch=1)) == len(texts)


@pytest.mark.parametrize(("texts", "message"), [([], "no prompts"), (["a", ""], "no tokens")])
def test_texts_without_tokens_are_refused(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        data.batches(texts, tokenizer)


def test_an_image_network_has_no_tokenizer_and_is_sent_to_consensus():
    with pytest.raises(ValueError, match="no tokenizer.*removed by pl.prune_blocks"):
        data.batches(["a"], None)


@pytest.mark.parametrize("name", ["gemma2", "glm4", "exaone4", "gemma3_text"])
def test_behind_a_norm_a_head_scores_what_it_adds_to_the_stream(name, prompts):
    """The norm multiplies a token by one number and a channel by its gain; both are read off its input and output."""
    model = toy(name)
    family, s = families.family_of(model), families.sizes(model)
    heads = torch.zeros(s.blocks, s.heads, dtype=torch.float64)
    prompts = [[token % 60 for token in prompt] for prompt in prompts]
    for prompt in prompts:
        for i, block in enumerate(families.blocks(model)):
            seen = {}
            out, norm = block.get_submodule(family.heads_out), block.get_submodule(family.heads_norm)
            handles = [out.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0][0].double())),
                       norm.register_forward_hook(lambda _, args, y, seen=seen: seen.update(
                           before=args[0][0].double(), after=y[0].double()))]
            with torch.no_grad():
                model(torch.tensor([prompt]))
            for handle in handles:
                handle.remove()
            each = seen["after"] / seen["before"]  # (T, C): by what each channel of each token was multiplied
            parts = [each * (x @ w.T) for x, w in zip(seen["x"].split(s.head_width, 1),
                                                      out.weight.detach().double().split(s.head_width, 1), strict=True)]
            bias = 0 if out.bias is None else each * out.bias.double()
            torch.testing.assert_close(sum(parts) + bias, seen["after"], rtol=1e-4, atol=1e-4)  # they add up
            heads[i] += torch.stack([part.abs().sum(1).mean() for part in parts]) / len(prompts)
    found = amp.importance(model, [{"input_ids": torch.tensor([p]), "attention_mask": torch.ones(1, len(p), dtype=int)}
                                   for p in prompts])
    torch.testing.assert_close(found.heads.double(), heads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt", "olmo2"])
def test_types_without_heads_that_can_go_get_scores_of_neurons_alone(name):
    model = toy(name)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=int)}
    found = amp.importance(model, [batch])
    assert found.heads.numel() == 0 and found.neurons.shape == (2, 24) and found.neurons.sum() > 0
