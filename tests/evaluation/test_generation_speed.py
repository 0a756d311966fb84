"""Speed of language models: decoding is correct, intervals cover, upper bounds equal counts by hand."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning_lib.evaluation import generation_speed
from pruning_lib.models import families, surgery
from pruning_lib.pruning import importance, selection


def toy(**sizes):
    config = families.tiny("llama", **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def prompts(batch, tokens):
    return torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(1))


def without_heads(model, fraction=0.2):
    plan = selection.choose(importance.uniform(model), model, removed_fraction=fraction, heads_removed=2)
    return surgery.remove(model, plan)


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_written_is_what_transformers_writes(cut):
    model = without_heads(toy()) if cut else toy()
    ids = prompts(3, 9)
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generation_speed.generate(model, ids, 12), theirs[:, 9:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_recorded_steps_write_the_same_again_and_again(device):
    model, ids = without_heads(toy()).to(device), prompts(3, 9).to(device)
    wanted = generation_speed.generate(model, ids, 12)
    steps = generation_speed._Steps(model, ids, 12)
    for _ in range(2):
        again = steps.replay()  # as ``measure`` does, outside of inference mode
        with torch.inference_mode():
            found = [token.clone() for token, _ in again]
        assert torch.equal(torch.cat(found, dim=1), wanted)


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="needs a GPU"):
        generation_speed.measure({"one": toy()}, prompts(1, 4), graphs=True)


def test_a_model_that_does_more_takes_longer_and_models_take_turns():
    class Slow(torch.nn.Module):
        """A model that computes every call twice and counts the calls."""

        def __init__(self, model, name, seen):
            super().__init__()
            self.model, self.name, self.seen = model, name, seen

        def forward(self, **inputs):
            if inputs["past_key_values"] is None:
                self.seen.append(self.name)
            for _ in range(8 * (self.name == "slow")):
                self.model(input_ids=torch.ones(4, 64, dtype=torch.long))
            return self.model(**inputs)

    seen = []
    model = toy(width=64, neurons=256)
    took = generation_speed.measure({"fast": Slow(model, "fast", seen), "slow": Slow(model, "slow", seen)},
                                    prompts(2, 16), new_tokens=3, repetitions=6, warmup=1)
    assert seen == ["fast", "slow"] * 7
    assert [len(took[name].prefill_s) for name in took] == [len(took[name].token_s) for name in took] == [6, 6]
    for task in ("prefill_s", "token_s"):
        assert generation_speed.speedup(getattr(took["slow"], task), getattr(took["fast"], task))[1] > 1


def test_the_cache_shrinks_with_whole_groups_only():
    model = toy()
    took = generation_speed.measure({"dense": model, "cut": without_heads(model)}, prompts(2, 10), new_tokens=4,
                                    repetitions=6)
    per_token = 2 * 2 * 8 * 4  # blocks, keys and values, head width, bytes
    assert took["dense"].cache_bytes == 2 * per_token * 2 * 13  # groups, sequences; the last token is never read
    assert took["cut"].cache_bytes == took["dense"].cache_bytes / 2


def test_ideals_are_ratios_of_multiply_adds_and_of_bytes_counted_by_hand():
    dense = toy(vocabulary=64)
    cut, T, C, vocabulary = without_heads(dense), 10, 32, 64
    ids = prompts(1, T)

    def macs(heads, groups, neurons):
        projections = T * (2 * C * heads * 8 + 2 * C * groups * 8 + 3 * C * neurons)
        attention = 2 * heads * 8 * T * T
        return 2 * (projections + attention) + C * vocabulary  # two blocks, the last token's logits

    sizes = [families.sizes(model) for model in (dense, cut)]
    counted = [macs(s.heads, s.groups, s.neurons) for s in sizes]
    found = generation_speed.upper_bound(dense, cut, ids, (1000, 500))
    assert found.prefill == pytest.approx(counted[0] / counted[1], rel=1e-9)
    weights = [generation_speed.weight_bytes(model) for model in (dense, cut)]
    assert found.decode == pytest.approx((weights[0] + 1000) / (weights[1] + 500))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_fetched_only_where_it_makes_the_logits_too(tied):
    config = families.tiny("llama", vocabulary=64, width=32)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    every = 4 * sum(p.numel() for p in model.parameters())
    assert generation_speed.weight_bytes(model) == every - (0 if tied else 4 * 64 * 32)


@pytest.mark.parametrize("n", [6, 7, 9, 12, 25])
def test_the_interval_of_a_median_covers_it_in_nineteen_of_twenty_draws(n):
    draws = np.random.default_rng(0).exponential(size=(4000, n))
    held = [low <= math.log(2) <= high for _, low, high in map(generation_speed.median, draws.tolist())]
    assert 0.94 < np.mean(held)
    assert generation_speed.median(draws[0].tolist())[0] == np.median(draws[0])


def test_the_interval_is_no_wider_than_it_has_to_be():
    assert generation_speed.median(range(9)) == (4, 1, 7) and generation_speed.median(range(6)) == (2.5, 0, 5)
    # the 6th lowest and highest of 20, as in tables of the sign test
    assert generation_speed.median(range(20)) == (9.5, 5, 14)


@pytest.mark.parametrize("wrong", [{"new_tokens": 1}, {"repetitions": 5}])
def test_what_gives_no_measurement_is_refused(wrong):
    with pytest.raises(ValueError, match="give at least 2, 6"):
        generation_speed.measure({}, prompts(1, 3), **wrong)
    with pytest.raises(ValueError, match="at least 6"):
        generation_speed.median([1.0] * 5)
