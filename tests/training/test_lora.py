"""Adapters lower the loss and are merged into a plain model; an interruption does not change the result."""

import copy

import pytest
import torch
from conftest import hooks_of
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pruning_lib import data
from pruning_lib.models import checkpoints
from pruning_lib.training import lora
from pruning_lib.training.lora import Settings

PAIRS = [("Add 1 and 2.", "3"), ("Rhyme with light.", "night"), ("Say no.", "no no no"), ("Name a fruit.", "fig"),
         ("Count to three.", "1 2 3"), ("Who?", "me")]
QUICK = Settings(epochs=2, tokens_per_batch=60, lr=0.01, rank=2, alpha=4)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_merged_model_is_plain_and_only_its_projections_changed(family, tiny, tokenizer, tmp_path):
    model = tiny(family)
    before, modes = weights(model), [m.training for m in model.modules()]
    losses = lora.tune(model, tokenizer, PAIRS, settings=QUICK, progress=False)
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    blocks = {name for name, p in before.items() if ".layers." in name and p.ndim == 2 and "norm" not in name}
    assert weights(model).keys() == before.keys() and changed == blocks
    assert len(losses) > 4 and len(set(losses)) == len(losses)
    assert all(p.requires_grad for p in model.parameters()) and modes == [m.training for m in model.modules()]
    assert not hooks_of(model)
    checkpoints.save(model, None, tmp_path / "stored")  # reloads with plain transformers and compares bit for bit


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 5])
def test_an_interrupted_run_gone_on_with_gives_bit_for_bit_the_same(tiny, tokenizer, tmp_path, stop_at):
    whole, parts, state = tiny("llama"), tiny("llama"), torch.get_rng_state()
    losses = lora.tune(whole, tokenizer, PAIRS, settings=QUICK, progress=False)
    before, calls = weights(parts), []

    def stop(*_):
        calls.append(1)
        if len(calls) == stop_at:
            raise Stop

    handle = parts.model.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        lora.tune(parts, tokenizer, PAIRS, settings=QUICK, folder=tmp_path, every_steps=2, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in weights(parts).items())  # unchanged
    handle.remove()
    again = lora.tune(parts, tokenizer, PAIRS, settings=QUICK, folder=tmp_path, every_steps=2, progress=False)
    assert again == losses and len(calls) == stop_at
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(parts).items())
    assert torch.equal(torch.get_rng_state(), state) and len(list(tmp_path.iterdir())) == 1


def test_runs_that_share_a_folder_do_not_take_each_others_checkpoints(tiny, tokenizer, tmp_path):
    lora.tune(tiny("llama"), tokenizer, PAIRS, settings=QUICK, folder=tmp_path, progress=False)
    for seed, pairs in ((0, PAIRS[1:]), (1, PAIRS)):
        alone, shared = tiny("llama", seed=seed), tiny("llama", seed=seed)
        losses = lora.tune(alone, tokenizer, pairs, settings=QUICK, progress=False)
        assert lora.tune(shared, tokenizer, pairs, settings=QUICK, folder=tmp_path, progress=False) == losses
        assert all(torch.equal(p, weights(alone)[name]) for name, p in weights(shared).items())
    assert len(list(tmp_path.iterdir())) == 3


def test_an_epoch_holds_every_example_once_with_little_padding():
    lengths = [20 + 7 * i % 480 for i in range(950)]
    examples = [([i] * n, 1) for i, n in enumerate(lengths)]
    batches = [lora._shuffled(examples, Settings(), epoch) for epoch in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2]
    for epoch in batches:
        assert sorted(tokens[0] for batch in epoch for tokens, _ in batch) == list(range(950))
        padded = [len(batch) * max(len(tokens) for tokens, _ in batch) for batch in epoch]
        assert max(padded) <= Settings().tokens_per_batch and sum(padded) < 1.15 * sum(lengths)


@pytest.mark.parametrize("family", ["llama", "granite"])  # Granite divides the output of its classifier
def test_the_first_loss_is_the_mean_over_answer_tokens_only(tiny, tokenizer, family):
    model = tiny(family)
    settings = Settings(epochs=1, tokens_per_batch=10_000, dropout=0.0)
    total, count = 0.0, 0
    for prompt, answer in PAIRS:
        question = tokenizer(prompt)["input_ids"]
        tokens = torch.tensor([question + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(tokens).logits[0].log_softmax(-1)
        for place in range(len(question), tokens.shape[1]):
            total, count = total - scores[place - 1, tokens[0, place]].item(), count + 1
    (loss,) = lora.tune(model, tokenizer, PAIRS, settings=settings, progress=False)
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_a_step_in_parts_is_the_step_on_all_at_once(tiny, tokenizer, monkeypatch, kd_weight):
    """Weigh every answer token equally, whatever the length of its part; parts only save memory."""
    settings = Settings(epochs=2, tokens_per_batch=10_000, dropout=0.0, lr=0.01, kd_weight=kd_weight)
    found = []
    for tokens in (10_000, 60, 1):
        monkeypatch.setattr(lora, "AT_ONCE", tokens)
        model = tiny("llama")
        losses = lora.tune(model, tokenizer, PAIRS, settings=settings, progress=False,
                              teacher=tiny("llama", seed=1) if kd_weight else None)
        found.append((losses, weights(model)))
    for losses, after in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert all(torch.allclose(p, found[0][1][name], atol=1e-4) for name, p in after.items())


def test_distillation_pulls_towards_the_teacher(tiny, tokenizer):
    teacher, student = tiny("llama", seed=1), tiny("llama")
    same = copy.deepcopy(teacher)
    (first, *_) = lora.tune(same, tokenizer, PAIRS, teacher=teacher, progress=False,
                               settings=Settings(kd_weight=1.0, dropout=0.0, tokens_per_batch=60))
    assert first == pytest.approx(0, abs=1e-6)  # predicts the same as the teacher already
    losses = lora.tune(student, tokenizer, PAIRS, teacher=teacher, progress=False,
                          settings=Settings(kd_weight=1.0, lr=0.01, epochs=6, tokens_per_batch=60))
    assert losses[-1] < 0.9 * losses[0] and not teacher.training
    assert all(torch.equal(p, weights(tiny("llama", seed=1))[name]) for name, p in weights(teacher).items())


def test_another_teacher_does_not_go_on_from_what_the_first_one_taught(tiny, tokenizer, tmp_path):
    settings = Settings(epochs=1, tokens_per_batch=60, kd_weight=0.5)
    for seed in (1, 2):
        lora.tune(tiny("llama"), tokenizer, PAIRS, settings=settings, progress=False, folder=tmp_path,
                     teacher=tiny("llama", seed=seed))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_every_example_comes_once_per_epoch_in_another_order():
    examples = [([i] * (5 + i % 7), 2) for i in range(40)]
    first, again, second = ([tokens[0] for b in lora._shuffled(examples, QUICK, e) for tokens, _ in b]
                            for e in (0, 0, 1))
    assert sorted(first) == sorted(second) == list(range(40)) and first == again != second
    assert all(max(len(t) for t, _ in b) * len(b) <= 60 for b in lora._shuffled(examples, QUICK, 0))


def test_the_learning_rate_rises_and_falls_along_lines():
    shares = [lora._learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == shares[10] == 1.0 and shares[99] == pytest.approx(1 / 90)
    assert lora._learning_rate_factor(0, 1, 0.03) == 1.0


def test_what_cannot_be_tuned_is_refused(tiny, tokenizer):
    with pytest.raises(ValueError, match="float16.*bfloat16 or float32"):
        lora.tune(tiny("llama", dtype=torch.float16), tokenizer, PAIRS)
    with pytest.raises(ValueError, match="none of 1 pairs.*within 5 tokens"):
        lora.tune(tiny("llama"), tokenizer, [("a long prompt", "yes")], settings=Settings(max_length=5))
    with pytest.raises(ValueError, match="kd_weight=0.5 and no teacher"):
        lora.tune(tiny("llama"), tokenizer, PAIRS, settings=Settings(kd_weight=0.5))
    broken = tiny("llama")
    broken.lm_head.weight.data[0, 0] = torch.nan
    before = weights(broken)
    with pytest.raises(ValueError, match="loss is nan in step 1"):
        lora.tune(broken, tokenizer, PAIRS, progress=False)
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in weights(broken).items())


def test_a_bfloat16_model_stays_one_and_learns(tiny, tokenizer):
    model = tiny("phi3", dtype=torch.bfloat16)
    settings = Settings(epochs=8, tokens_per_batch=10_000, lr=0.01)  # every step sees every pair
    losses = lora.tune(model, tokenizer, PAIRS, settings=settings, progress=False)
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def with_spaces():
    """A tokenizer of the kind of LLaMA 2: a space in front of every text, one token per character, BOS added."""
    letters = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz.:\n"])}
    inner = Tokenizer(WordLevel({**letters, "\n\n": len(letters)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        pre_tokenizers.Split(Regex(r"\n\n|[\s\S]"), "isolated")])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_an_answer_is_tokenised_with_its_prompt(with_spaces):
    """As at inference: no space begins the answer that would not stand there in one text."""
    assert with_spaces.convert_ids_to_tokens(with_spaces("no", add_special_tokens=False)["input_ids"])[0] == "\u2581"
    examples = lora._examples(with_spaces, [("say:\n", "no"), ("q", "yes")], 64)
    for (tokens, question), (prompt, answer) in zip(examples, [("say:\n", "no"), ("q", "yes")], strict=True):
        assert with_spaces.convert_ids_to_tokens(tokens) == ["<s>", "\u2581", *prompt, *answer, "</s>"]
        assert question == 2 + len(prompt)


def test_a_token_across_the_border_is_predicted(with_spaces):
    (tokens, question), = lora._examples(with_spaces, [("say\n", "\nno")], 64)
    assert with_spaces.convert_ids_to_tokens(tokens[question:]) == ["\n\n", "n", "o", "</s>"]


def test_examples_end_at_the_trained_positions(tiny, tokenizer):
    """A model of 128 positions never sees a token beyond them."""
    model, seen = tiny("llama"), []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    lora.tune(model, tokenizer, [("Say a.", "a" * 300)], settings=QUICK, progress=False)
    assert set(seen) == {128}


@pytest.mark.model
def test_the_published_recovery_of_the_default_model_had_these_examples(smollm):
    """Prompt and answer apart or together: the same tokens, with the default tokenizer and Alpaca's layout."""
    _, tokenizer = smollm
    pairs = data.pairs("mini_prompts", skip=0)
    apart = [(tokenizer(p)["input_ids"], tokenizer(a)["input_ids"] + [tokenizer.eos_token_id]) for p, a in pairs]
    assert lora._examples(tokenizer, pairs, 512) == [(p + a, len(p)) for p, a in apart]
