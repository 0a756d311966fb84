"""Batches hold each prompt's tokens in whatever form they come; other forms are refused with the one that is wanted."""

import pytest
import torch
from torch.utils.data import DataLoader

from pruning_lib import data
from pruning_lib.data.batching import right_padded
from pruning_lib.evaluation import quality
from pruning_lib.pruning import amp, importance, pipeline


@pytest.fixture
def batch():
    """Three prompts of 5, 2 and 4 tokens, padded on the right."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 0, 0, 0], [9, 8, 7, 6, 0]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])}


def left(batch):
    """The same prompts padded on the left."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return {name: torch.stack([row.roll(5 - n) for row, n in zip(t, lengths, strict=True)])
            for name, t in batch.items()}


def test_padding_on_the_left_moves_to_the_right(batch):
    moved, = right_padded([left(batch)])
    assert torch.equal(moved["attention_mask"], batch["attention_mask"])
    assert torch.equal(moved["input_ids"] * moved["attention_mask"], batch["input_ids"])
    boolean = {**batch, "attention_mask": batch["attention_mask"].bool()}
    assert torch.equal(right_padded([boolean])[0]["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("method", ["amp", "wanda", "taylor"])
def test_scores_do_not_depend_on_the_side_of_the_padding(tiny, batch, method):
    model = tiny("llama")
    scores = [importance.importance(model, [b], method=method) for b in (batch, left(batch))]
    assert torch.equal(scores[0].heads, scores[1].heads) and torch.equal(scores[0].neurons, scores[1].neurons)


def test_a_data_loader_prunes_as_a_list_does(tiny, batch):
    rows = [{name: t[i] for name, t in batch.items()} | {"labels": torch.tensor(i)} for i in range(3)]
    model = tiny("llama")
    found = [pipeline.prune(model, batches, removed_fraction=0.1).plan.neurons
             for batches in ([batch], DataLoader(rows, batch_size=3), iter([left(batch)]))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("given", "message"), [
    (lambda b: "Say no.", "a single str"), (lambda b: b, "a single dict"),
    (lambda b: b["input_ids"], "a single Tensor"),
    (lambda b: ["Say no."], "batch 0 is a str without input_ids; give pl.batches"),
    (lambda b: [b["input_ids"]], "batch 0 is a Tensor"),
    (lambda b: [b, {"input_ids": b["input_ids"]}], "batch 1 has no attention_mask.*torch.ones_like"),
    (lambda b: [{**b, "attention_mask": b["attention_mask"] * 0}], "a prompt without tokens"),
    (lambda b: [{**b, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)}], "has gaps"),
    (lambda b: [{**b, "attention_mask": torch.tensor([[0, 1, 1, 1, 0]] * 3)}], "has gaps"),
    (lambda b: [{**b, "attention_mask": torch.ones(3, 4)}], r"input_ids \(3, 5\) and attention_mask \(3, 4\)")])
def test_other_forms_are_refused_with_the_one_that_is_wanted(tiny, batch, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline.prune(tiny("llama"), given(batch), removed_fraction=0.1)


def test_a_single_text_is_no_list_of_prompts(tokenizer):
    with pytest.raises(ValueError, match="prompts is a single text, 'Say no.'"):
        data.batches("Say no.", tokenizer)


def test_no_prompt_is_longer_than_the_trained_positions(tiny, tokenizer):
    model = tiny("llama")  # 128 positions
    assert pipeline.tokenized(model, tokenizer, ["a" * 300])[0]["input_ids"].shape == (1, 128)
    pipeline.prune(model, tokenizer, calibration=["a" * 300, "b"], removed_fraction=0.1)
    with pytest.raises(ValueError, match="a prompt has 300 tokens, the model was trained for 128 positions"):
        pipeline.prune(model, data.batches(["a" * 300], tokenizer), removed_fraction=0.1)


def test_a_function_of_ones_own_scores_or_ranks(tiny, batch):
    model = tiny("llama")
    scores = amp.importance(model, [batch])
    for own in (lambda m, b: scores, lambda m, b: (scores.heads, scores.neurons)):
        found = pipeline.prune(model, [batch], method=own, removed_fraction=0.1)
        assert torch.equal(found.plan.neurons, pipeline.prune(model, [batch], removed_fraction=0.1).plan.neurons)
    found = pipeline.prune(model, [batch], method="none", blocks_removed=1, criterion=lambda m, b: ["model.layers.1"])
    assert found.blocks == ("model.layers.1",)
    for own, message in ((lambda m, b: scores.heads, "returned a Tensor; wanted an Importance"),
                         (lambda m, b: (scores.neurons, scores.heads), "importance of heads has shape")):
        with pytest.raises(ValueError, match=message):
            pipeline.prune(model, [batch], method=own, removed_fraction=0.1)
    with pytest.raises(ValueError, match="wanted names of blocks: model.layers.0, model.layers.1"):
        pipeline.prune(model, [batch], method="none", blocks_removed=1, criterion=lambda m, b: ["layer 1"])


def test_a_tokenizer_of_another_model_is_named(tiny, tokenizer, batch):
    model = tiny("llama", vocabulary=50)  # the tokenizer has 100 tokens
    looked = []
    model.register_forward_pre_hook(lambda *_: looked.append(1))
    for act in (lambda: pipeline.prune(model, tokenizer, calibration=["a~", "b"], removed_fraction=0.1),
                lambda: quality.perplexity(model, tokenizer, ["some ~ text"])):
        with pytest.raises(ValueError, match="has embeddings for 50 tokens: tokenizer and model do not belong"):
            act()
    assert not looked
