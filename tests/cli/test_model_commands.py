"""The commands inspect, prune, evaluate and compare, write a loadable folder, and refuse bad input at once."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning_lib import data
from pruning_lib.cli import main
from pruning_lib.models import families, loading
from pruning_lib.models.plan import Plan
from pruning_lib.models.toy_models import toy_config
from pruning_lib.pruning import amp, selection

SMALL = ["--calibration", "mini_prompts", "--prompts", "4", "--text", "mini_text", "--tokens", "300", "--window", "100"]


def test_inspect_lists_every_cut_and_the_fractions_it_reaches(dense, call):
    status, out, _ = call("inspect", dense, "--json")
    facts, model = json.loads(out), loading.load_model(str(dense))[0]
    assert status == 0 and (facts["heads"], facts["groups"], facts["neurons"]) == (6, 3, 60)
    assert [(c["grouped_query"], c["heads_removed"]) for c in facts["cuts"]] == [
        ("whole_groups", 0), ("whole_groups", 2), ("whole_groups", 4), ("equal_queries", 3)]
    scores = selection.Importance(torch.zeros(3, 6), torch.zeros(3, 60), {})
    for cut in facts["cuts"]:
        for fraction, fits in ((cut["least_fraction"] + 1e-9, True), (cut["most_fraction"] - 1e-9, True),
                               (cut["most_fraction"] + 0.01, False)):
            try:
                selection.choose(scores, model, removed_fraction=fraction, heads_removed=cut["heads_removed"],
                             grouped_query=cut["grouped_query"])
                reached = True
            except ValueError:
                reached = False
            assert reached == fits, (cut, fraction)
    shown = call("inspect", dense)[1]
    assert f"{facts['parameters']:,} parameters, 3 blocks of 6 heads in 3 groups and 60 neurons" in shown


def test_inspect_says_which_head_counts_could_not_be_stored(tiny, call, tmp_path):
    tiny("llama", heads=6, groups=6, fields={"attention_bias": True}).save_pretrained(tmp_path / "biased")
    facts = json.loads(call("inspect", tmp_path / "biased", "--json")[1])
    refused = {cut["heads_removed"] for cut in facts["cuts"] if "attention_bias" in cut["refused"]}
    assert refused == {1}  # 5 heads do not divide a width of 48


def test_prune_leaves_a_plain_checkpoint_with_a_card_that_says_what_was_done(dense, call, tmp_path):
    out = tmp_path / "small"
    status, shown, _ = call("prune", "--model", dense, "--removed-fraction", "0.2", "--heads-removed", "2",
                           "--reconstruct", "sequential", "--reconstruction-text", "mini_calibration_text",
                           "--reconstruction-samples", "4", "--recover", "mini_prompts", "--recover-pairs", "3",
                           "--epochs", "1", "--kd-weight", "0.5", "--out", out, "--json", *SMALL)
    facts = json.loads(shown)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert status == 0 and model.config.num_attention_heads == 4
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts == json.loads((out / "pruning.json").read_text()), "the JSON is the record"
    assert list(facts["measured"]) == ["dense", "pruned", "recovered"]
    assert set(facts["made_with"]["data"]) == {"mini_prompts", "mini_calibration_text (long)",
                                               "mini_prompts (recovery)"}
    whole, tokenizer = loading.load_model(str(dense))
    plan = selection.choose(amp.importance(whole, data.batches(data.texts("mini_prompts", 4), tokenizer)), whole,
                        removed_fraction=facts["arguments"]["removed_fraction"], heads_removed=2)
    assert facts["removed"]["heads"] == [" ".join(map(str, row)) for row in plan.removed_heads.sort().values.tolist()]
    assert facts["removed"]["neurons"] == [" ".join(map(str, row)) for row in plan.neurons.sort().values.tolist()]
    assert len(facts["removed"]["ridges"]) == 6 and "out" not in facts["arguments"]
    assert f"loss {facts['losses'][0]:.3f} to {facts['losses'][-1]:.3f}" in facts["steps"][-1]
    card = (out / "README.md").read_text()
    for word in ("AutoModelForCausalLM.from_pretrained", "each of 3 blocks keeps 4 of 6 heads", "reconstruction",
                 "LoRA", "following", f"{facts['measured']['recovered']['perplexity']:.2f}",
                 facts["made_with"]["data"]["mini_prompts"]):
        assert word in card, word
    values = json.loads(call("evaluate", out, "--json", *SMALL[4:])[1])
    assert values["perplexity"] == pytest.approx(facts["measured"]["recovered"]["perplexity"], rel=1e-9)
    assert "| evaluated 3 |" in (out / "README.md").read_text()


def test_a_gpu_gets_sizes_that_suit_it(dense, call, tmp_path):
    for multiple_of, neurons in ((1, 46), (8, 48)):
        out = tmp_path / str(multiple_of)
        given = ["--model", dense, "--removed-fraction", "0.1", "--multiple-of", multiple_of, "--out", out]
        assert call("prune", *given, *SMALL)[0] == 0
        assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == neurons


def test_compare_puts_two_models_side_by_side_on_the_same_text(dense, call, tmp_path):
    out = tmp_path / "small"
    assert call("prune", "--model", dense, "--removed-fraction", "0.2", "--out", out, *SMALL)[0] == 0
    facts = json.loads(call("compare", out, dense, "--json", *SMALL[4:])[1])
    assert facts["parameters_ratio"] == pytest.approx(0.8, abs=0.01)
    assert facts["perplexity_ratio"] == facts["first"]["perplexity"] / facts["second"]["perplexity"]
    assert "paired" not in facts and facts["first"]["tokens"] == facts["second"]["tokens"] == 297


def test_perplexities_of_other_tokens_are_not_divided(dense, call, tmp_path):
    other = shutil.copytree(dense, tmp_path / "other")
    words = loading.load_model(str(dense))[1]
    words.add_tokens(["[PAD]"])  # which this text does not have, so nothing changes
    words.save_pretrained(other)
    assert json.loads(call("compare", dense, other, "--json", *SMALL[4:])[1])["perplexity_ratio"] == 1
    words.add_tokens(["the"])
    words.save_pretrained(other)
    assert json.loads(call("compare", dense, other, "--json", *SMALL[4:])[1])["perplexity_ratio"] is None
    assert "cut this text into other tokens; --tasks" in call("compare", dense, other, *SMALL[4:])[1]


def test_a_text_of_a_single_window_has_a_perplexity_and_no_interval(dense, call, tmp_path):
    out = tmp_path / "s"
    one = [*SMALL[:-1], "512"]
    status, shown, _ = call("prune", "--model", dense, "--removed-fraction", "0.2", "--out", out, *one)
    assert status == 0 and shown.count("[no interval from one window] on 299 tokens") == 2
    assert (out / "README.md").read_text().count("no interval from one window") == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (("--removed-fraction", "0.99"), "cannot be reached"), (("--heads-removed", "1"), "not a lossless cut"),
    (("--prompts", "1000"), "1000 texts of 'mini_prompts'; give 1 to 64"), (("--blocks-removed", "1"), "give both"),
    (("--recover", "mini_prompts", "--recover-pairs", "1000"), "1000 pairs of"),
])
def test_what_cannot_be_done_ends_at_once_with_the_way_out_and_no_folder(dense, call, tmp_path, arguments, message):
    status, shown, error = call("prune", "--model", dense, "--out", tmp_path / "small",
                               "--removed-fraction", "0.2", *SMALL, *arguments)
    assert status == 1 and not shown and message in error and error.startswith("pruning-lib prune: ")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_a_folder_that_holds_something_is_refused_before_the_model_is_loaded(tmp_path, call, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, error = call("prune", "--model", "m", "--out", tmp_path, "--removed-fraction", "0.2", *SMALL)
    assert status == 1 and "not empty" in error


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_a_model_that_does_not_exist_is_refused_with_those_that_do(command, call):
    status, _, error = call(command, "nobody")
    assert status == 1 and "unknown model 'nobody'" in error


def test_allowed_counts_the_parameters_of_every_family(family, tiny):
    model = tiny(family, heads=6, groups=3)
    facts, s = selection.lossless_cuts(model), families.sizes(model)
    plan = Plan("whole_groups", torch.tensor([[0], [0]]), torch.arange(23).expand(2, 23), s)
    assert facts["cuts"][1]["most_fraction"] == pytest.approx(plan.removed_fraction, rel=1e-12)


@pytest.mark.parametrize(("name", "said"), [
    ("gpt2", "2 blocks of 24 neurons\nall neurons but one"),
    ("olmo2", "heads cannot be removed: removing does not equal masking: self_attn.q_norm"),
    ("gpt2", "heads cannot be removed: no projection follows"), ("mixtral", "2 blocks have 4 experts of 24 neurons")])
def test_inspect_gives_the_reason_of_the_page_of_model_types(name, said, tmp_path, capsys):
    toy_config(name).save_pretrained(tmp_path)  # the config alone
    assert main.main(["inspect", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out


def test_an_adapter_is_refused_with_the_option_that_merges_it(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert main.main(["evaluate", str(tmp_path), "--text", "mini_text"]) == 1
    assert "adapter of some/base" in (said := capsys.readouterr().err) and "--merge-adapter" in said
