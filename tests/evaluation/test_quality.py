"""Perplexity equals a slow loop, scores equal the stock harness, and intervals are the known ones."""

import copy
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import build, hooks_of
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

from pruning_lib import data
from pruning_lib.data.batching import bos_token
from pruning_lib.evaluation import harness_tasks, quality
from pruning_lib.evaluation.shared_context_lm import SharedContextLM
from pruning_lib.models import families

TEXTS = ["It is a truth universally acknowledged,", "that a single man", "in possession of a good fortune."]


# --- perplexity -------------------------------------------------------------------------------------------------------


def slow_perplexity(model, ids, window, stride, bos=()):
    """Every token on its own: the first window that holds it together with a token before it, behind ``bos``."""
    losses, window = [], window - len(bos)
    for t in range(1, len(ids)):
        start = next((s for s in range(0, t, stride) if t < s + window), None)
        if start is None:  # it stands first in the only window that holds it
            continue
        with torch.no_grad():
            logits = model(torch.tensor([[*bos, *ids[start:t]]])).logits[0, -1].double()
        losses.append(-logits.log_softmax(0)[ids[t]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(("window", "stride", "max_tokens"), [
    (200, 200, None), (20, 20, None), (20, 7, None), (20, 19, None), (16, 16, 64), (16, 16, 65), (16, 5, 33),
    (2, 1, 30), (2, 2, 30), (93, 93, None)])
def test_perplexity_equals_the_slow_loop(tiny, tokenizer, window, stride, max_tokens):
    model = tiny("qwen2", fields={"max_position_embeddings": 256})
    ids = tokenizer("\n\n".join(TEXTS))["input_ids"][:max_tokens]
    expected, tokens = slow_perplexity(model, ids, window, stride)
    found = quality.perplexity(model, tokenizer, TEXTS, window=window, stride=stride, max_tokens=max_tokens,
                                progress=False)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (found["tokens"], found["window"], found["stride"]) == (tokens, window, stride)


def test_perplexity_holds_for_every_family_and_windows_taken_in_pieces(family, tiny, tokenizer):
    """Cover windows longer than 256 predictions, the size of a piece of logits."""
    model, text = tiny(family, fields={"max_position_embeddings": 512}), "".join(TEXTS) * 4
    ids = torch.tensor([tokenizer(text)["input_ids"][:300]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.exp().item()
    found = quality.perplexity(model, tokenizer, [text], window=300, stride=300, max_tokens=300, progress=False)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5) and found["tokens"] == 299


@pytest.mark.parametrize(("kind", "fields", "known"), [
    ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 12}, True), ("cohere", {"logit_scale": 3.0}, False)])
def test_logits_that_are_no_plain_output_of_the_classifier_count_as_the_model_gives_them(kind, fields, known, tokenizer,
                                                                                         both):
    config = AutoConfig.for_model(kind, vocab_size=128, hidden_size=48, intermediate_size=24, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **fields)
    model = build(config)
    assert families.logits_known(model) == known
    ids = torch.tensor([tokenizer("".join(TEXTS))["input_ids"]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.exp().item()
    found = quality.perplexity(model, tokenizer, ["".join(TEXTS)], progress=False)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    stock, ours = both(model, pairs_of(model, tokenizer))
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-5, atol=1e-4)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(family, tiny, tokenizer):
    model = tiny(family, vocabulary=128)
    for p in model.get_output_embeddings().parameters():
        p.data.zero_()
    found = quality.perplexity(model, tokenizer, TEXTS, window=16, stride=8, progress=False)
    for key in ("perplexity", "perplexity_low", "perplexity_high"):
        assert found[key] == pytest.approx(128, rel=1e-5)


def test_the_interval_of_perplexity_is_that_of_the_mean_over_equal_windows(tiny, tokenizer):
    """Compare with the t interval of a mean; for windows of equal length the ratio estimate is a plain mean."""
    from scipy import stats

    model, text = tiny("llama"), "".join(TEXTS)[:80]
    found = quality.perplexity(model, tokenizer, [text], window=16, stride=16, progress=False)
    logs = [math.log(quality.perplexity(model, tokenizer, [text[i:i + 16]], window=16, stride=16)["perplexity"])
            for i in range(0, 80, 16)]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(logs), scale=stats.sem(logs))
    assert found["perplexity_low"] == pytest.approx(math.exp(low), rel=1e-4)
    assert found["perplexity_high"] == pytest.approx(math.exp(high), rel=1e-4)
    assert found["tokens"] == 75


def test_a_single_window_has_no_interval(tiny, tokenizer):
    found = quality.perplexity(tiny("llama"), tokenizer, ["".join(TEXTS)[:80]], window=80, stride=80, progress=False)
    assert found["perplexity_low"] is None and found["perplexity_high"] is None and found["perplexity"] > 1


@pytest.fixture
def adding(tokenizer):
    """The toy tokenizer, putting a BOS token in front of every text, as those of Gemma and LLaMA do."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert made("ab")["input_ids"] == [1, *tokenizer("ab")["input_ids"]]
    return made


@pytest.mark.parametrize(("window", "stride", "max_tokens"), [
    (94, 94, None), (20, 19, None), (20, 7, None), (16, 15, 64), (16, 15, 61), (3, 2, 30)])
def test_windows_begin_with_bos_where_the_tokenizer_adds_one(tiny, tokenizer, adding, window, stride, max_tokens):
    model = tiny("llama")
    ids = tokenizer("\n\n".join(TEXTS))["input_ids"][:max_tokens]
    expected, tokens = slow_perplexity(model, ids, window, stride, bos=[1])
    found = quality.perplexity(model, adding, TEXTS, window=window, stride=stride, max_tokens=max_tokens)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (found["tokens"], found["bos_token"]) == (tokens, True)
    assert not quality.perplexity(model, tokenizer, TEXTS, window=window, stride=stride)["bos_token"]


def test_a_stride_of_a_whole_window_leaves_no_token_between_windows_with_bos(tiny, adding):
    found = quality.perplexity(tiny("llama"), adding, ["".join(TEXTS)[:75]], window=16, stride=16)
    assert found["tokens"] == 75 - 5  # five windows of 15, of each all but the first


@pytest.mark.parametrize("special", [{}, {"eos_token": "</s>"}, {"bos_token": "<s>"}])
def test_a_tokenizer_that_adds_none_gives_none(tiny, tokenizer, special):
    """Also one without any special token; a BOS token that exists but is not added counts as little."""
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    assert bos_token(bare) is None
    first, second = (quality.perplexity(tiny("llama"), t, TEXTS, window=16) for t in (tokenizer, bare))
    assert first == second


def test_nats_per_character_are_the_whole_loss_over_the_text_that_was_predicted(tiny, tokenizer):
    """One character is one token here."""
    found = quality.perplexity(tiny("llama"), tokenizer, TEXTS, window=16, stride=16, progress=False)
    assert found["nats_per_character"] == pytest.approx(math.log(found["perplexity"]))


def test_a_window_is_never_longer_than_the_trained_positions(tiny, tokenizer):
    model, text = tiny("llama"), "".join(TEXTS) * 4  # 128 positions
    assert quality.perplexity(model, tokenizer, [text])["window"] == 128
    with pytest.raises(ValueError, match="the window has 129 tokens, the model was trained for 128 positions"):
        quality.perplexity(model, tokenizer, [text], window=129)
    assert quality.check_window(tiny("llama", fields={"max_position_embeddings": 8192}), None) == (2048, 2048)


@pytest.mark.parametrize(("options", "message"), [({"max_tokens": -100}, "max_tokens=-100; give 2 or more"),
                                                  ({"max_tokens": 1}, "max_tokens=1"), ({}, "a single text, 'It is a")])
def test_counts_and_texts_of_another_form_are_refused(tiny, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        quality.perplexity(tiny("llama"), tokenizer, TEXTS if options else TEXTS[0], **options)


@pytest.mark.parametrize(("texts", "window", "stride", "message"), [
    (TEXTS, 1, 1, "window=1"), (TEXTS, 16, 17, "stride=17"), (TEXTS, 16, 0, "stride=0"), (TEXTS, 16, -4, "stride=-4"),
    (["a"], 16, 16, "fewer than two tokens"), ([""], 16, 16, "fewer than two tokens")])
def test_what_has_no_perplexity_is_refused(tiny, tokenizer, texts, window, stride, message):
    with pytest.raises(ValueError, match=message):
        quality.perplexity(tiny("llama"), tokenizer, texts, window=window, stride=stride)


# --- the harness ------------------------------------------------------------------------------------------------------


def greedy(model, tokenizer, context, n):
    """Return the ``n`` characters of greedy decoding; None unless all are plain characters."""
    ids = tokenizer(context)["input_ids"]
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    text = tokenizer.decode(ids[-n:])
    return text if min(ids[-n:]) > 4 and max(ids[-n:]) < 99 and text.strip() == text else None  # no blank, no special


def requests(pairs):
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def both(tokenizer):
    """Return ``both(model, pairs)``: (log likelihoods, greedy flags) of the stock class and of ours, in order."""

    def score(model, pairs, **options):
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
        found = [np.array(lm.loglikelihood(requests(pairs), disable_tqdm=True), dtype=float).T
                 for lm in (stock, SharedContextLM(model, tokenizer, **options))]
        return found

    return score


def pairs_of(model, tokenizer):
    """Return questions with short and long answers, a single question, an empty one, and greedy answers."""
    pairs = [(question, answer) for question in ("Why", "A river is", "The longest of all these questions")
             for answer in (" yes", "s", " because of the rain", "!")]
    written = [(c, greedy(model, tokenizer, c, n)) for c in "abcdefghijklmnopqrstuvwxyz" for n in (1, 2)]
    return [*pairs, ("Alone", " again"), ("", "Only an answer"), ("", "x"), *[(c, a) for c, a in written if a]]


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 2048])
def test_answers_scored_together_score_as_they_do_alone(family, tiny, tokenizer, both, tokens_per_batch):
    model = tiny(family, heads=6, groups=3)
    pairs = pairs_of(model, tokenizer)
    stock, ours = both(model, pairs, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-5, atol=1e-4)
    assert (ours[1] == stock[1]).all()
    assert 3 <= stock[1].sum() < len(pairs)  # some answers are the model's own, some are not
    assert not hooks_of(model)


def test_eager_attention_scores_the_same(tiny, tokenizer, both):
    model = tiny("qwen3")
    model.set_attn_implementation("eager")
    stock, ours = both(model, pairs_of(model, tokenizer))
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"sliding_window": 6}, {"max_position_embeddings": 20}])
def test_questions_beyond_the_models_reach_are_left_to_the_stock_class(tiny, tokenizer, both, sizes):
    """Cover a sliding window, and a question beyond the context, which the stock class cuts on the left."""
    model = tiny("mistral", fields=sizes)
    stock, ours = both(model, pairs_of(model, tokenizer))
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-5, atol=1e-4)


# --- zero-shot tasks --------------------------------------------------------------------------------------------------


def test_the_mini_tasks_score_the_same_with_the_stock_class_and_count_what_they_say(tiny, tokenizer):
    model = tiny("llama", fields={"max_position_embeddings": 512})
    limits = dict.fromkeys(quality.TASKS["mini"], 12)
    values, packed = quality.zero_shot(model, tokenizer, "mini", limits=limits)
    stock_values, stock_packed = quality.zero_shot(model, tokenizer, "mini", limits=limits, stock=True)
    assert packed == stock_packed and values == stock_values
    means = []
    for task, kind in quality.TASKS["mini"].items():
        right = quality.unpack(packed[task])
        assert len(right) == values[f"{task}_items"] == 12
        assert right.mean() == values[f"{task}_{kind}_fraction"]
        assert values[f"{task}_{kind}_low"] <= right.mean() <= values[f"{task}_{kind}_high"]
        means.append(right.mean())
    assert values["mini_mean_fraction"] == pytest.approx(np.mean(means))
    assert "mini_winogrande_acc_norm_fraction" not in values  # that task has no such kind
    assert values["mini_piqa_acc_fraction"] >= 0  # where there are two kinds, both are stated


@pytest.mark.parametrize(("tasks", "message"), [
    ("none", "allowed: official, mini, or names"), ("arc_eazy", "no task or group 'arc_eazy'; nearest: arc_easy"),
    ("piqa,,boolq", "joined by commas"), ("missing.yaml", "no task or group 'missing.yaml'")])
def test_other_tasks_are_refused_with_the_nearest(tiny, tokenizer, tasks, message):
    with pytest.raises(ValueError, match=message):
        quality.zero_shot(tiny("llama"), tokenizer, tasks)


def test_groups_of_lm_eval_are_known():
    for tasks in ("mmlu", "piqa,ai2_arc", "official", "mini", "none"):
        harness_tasks.check_tasks(tasks)


def test_tasks_are_named_one_by_one_or_by_their_file(tiny, tokenizer, tmp_path):
    model = tiny("llama", fields={"max_position_embeddings": 512})
    config = {**harness_tasks.task("mini_piqa"), "task": "mine"}
    config["metric_list"] = [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                             for name in ("acc", "acc_norm", "brier_score")]
    config["metric_list"][2]["aggregation"] = "brier_score"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    tasks = f"mini_winogrande,{tmp_path / 'mine.yaml'}"
    values, items = quality.zero_shot(model, tokenizer, tasks)
    known, packed = quality.zero_shot(model, tokenizer, "mini")
    assert items == {"mini_winogrande": packed["mini_winogrande"], "mine": packed["mini_piqa"]}
    assert values["mine_acc_norm_fraction"] == known["mini_piqa_acc_norm_fraction"] and values["mine_brier_score"] > 0
    assert values[f"{tasks}_mean_fraction"] == pytest.approx(
        (known["mini_winogrande_acc_fraction"] + known["mini_piqa_acc_norm_fraction"]) / 2)


@pytest.mark.model
def test_the_default_model_is_clearly_better_than_chance(smollm):
    values, items = quality.zero_shot(*smollm, "mini", limits=dict.fromkeys(quality.TASKS["mini"], 12))
    chance = np.mean([1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4])
    right = np.concatenate([quality.unpack(packed) for packed in items.values()])
    assert len(right) == 60 and values["mini_mean_fraction"] == pytest.approx(right.mean())
    assert quality.interval(right)[0] > chance + 0.1


@pytest.mark.model
def test_the_default_models_windows_have_no_bos_as_in_the_published_numbers(smollm):
    model, tokenizer = smollm
    assert bos_token(tokenizer) is None
    found = quality.perplexity(model, tokenizer, data.texts("mini_text"), window=256, stride=256, max_tokens=512)
    ids = torch.tensor(tokenizer("\n\n".join(data.texts("mini_text")))["input_ids"][:512]).view(2, 256)
    with torch.no_grad():
        expected = torch.stack([model(row[None], labels=row[None]).loss for row in ids]).mean().exp().item()
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5) and not found["bos_token"]


@pytest.mark.model
def test_the_default_model_reads_plain_english(smollm):
    found = quality.perplexity(*smollm, data.texts("mini_text"), window=256, stride=256, max_tokens=512)
    assert 5 < found["perplexity"] < 40


# --- intervals and pairs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "of", "low", "high"), [
    (8, 10, 0.4901625, 0.9433178), (0, 20, 0, 0.1611252), (20, 20, 0.8388748, 1), (50, 100, 0.4038315, 0.5961685)])
def test_the_interval_is_wilsons(right, of, low, high):
    """Compare with values of Wilson (1927) computed by hand with z = 1.959964."""
    z, p = 1.959964, right / of
    middle, half = (p + z * z / 2 / of) / (1 + z * z / of), z / (1 + z * z / of) * math.sqrt(
        p * (1 - p) / of + z * z / 4 / of ** 2)
    assert (middle - half, middle + half) == pytest.approx((low, high), abs=1e-6)
    assert quality.interval(np.arange(of) < right) == pytest.approx((low, high), abs=1e-6)


def test_a_model_compared_with_itself_differs_by_nothing():
    items = {"a": quality.pack(np.arange(50) % 3 == 0), "b": quality.pack(np.arange(20) % 2 == 0)}
    assert quality.questions(items) == {"a": 50, "b": 20}
    assert quality.paired(items, items) == {
        "difference_fraction": 0, "difference_low": 0, "difference_high": 0, "items": 70, "p_value": 1}


def test_the_first_model_is_ahead_when_the_difference_is_positive():
    """Compare ten correct items with six: 4 against 0, so p = 2 / 2^4; a task counts once."""
    ahead = {"a": quality.pack(np.ones(10, bool)), "b": quality.pack(np.ones(30, bool))}
    behind = {"a": quality.pack(np.arange(10) < 6), "b": quality.pack(np.ones(30, bool))}
    found = quality.paired(ahead, behind)
    assert found["difference_fraction"] == pytest.approx((0.4 + 0) / 2)
    assert found["p_value"] == pytest.approx(2 / 2 ** 4) and found["items"] == 40
    half = 1.96 * math.sqrt(0.4 * 0.6 * 10 / 9 / 10) / 2
    assert (found["difference_low"], found["difference_high"]) == pytest.approx((0.2 - half, 0.2 + half))
    back = quality.paired(behind, ahead)
    assert back["difference_fraction"] == -found["difference_fraction"] and back["p_value"] == found["p_value"]


def test_models_measured_on_other_tasks_or_other_numbers_of_items_are_not_compared():
    ten, nine = (quality.pack(np.ones(n, bool)) for n in (10, 9))
    with pytest.raises(ValueError, match="piqa: 10 items against 9"):
        quality.paired({"piqa": ten}, {"piqa": nine})
    with pytest.raises(ValueError, match=r"different tasks: \['piqa'\] and \['arc_easy'\]"):
        quality.paired({"piqa": ten}, {"arc_easy": ten})
    with pytest.raises(ValueError, match="same tasks"):
        quality.paired({}, {})


@pytest.mark.parametrize("n", [1, 7, 8, 9, 250, 10042])
def test_packed_items_come_back(n):
    right = np.random.default_rng(n).random(n) < 0.6
    text = quality.pack(right)
    assert (quality.unpack(text) == right).all() and quality.unpack(text).dtype == bool
    assert len(text) < n / 5 + 16
