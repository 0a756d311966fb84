"""``prune`` does what the function does, refuses before it works, and loses nothing afterwards."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning_lib import data
from pruning_lib.cli import main
from pruning_lib.evaluation import quality
from pruning_lib.models import loading
from pruning_lib.models.toy_models import toy
from pruning_lib.pruning import amp, pipeline
from pruning_lib.training import lora

QUICK = ["--calibration", "mini_prompts", "--prompts", "4", "--text", "mini_text", "--tokens", "300", "--window", "100"]
PLAIN = ["--reconstruct", "none"]  # quicker than the default


@pytest.fixture
def prune(dense, tmp_path, call):
    """``prune(*arguments)`` -> (status, standard output, standard error); the result goes to ``small``."""

    def run(*arguments, fraction=("--removed-fraction", "0.2"), quick=QUICK, plain=PLAIN, out=tmp_path / "small"):
        return call("prune", "--model", dense, "--out", out, *fraction, *plain, *quick, *arguments)

    return run


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- one meaning ------------------------------------------------------------------------------------------------------


def test_command_and_function_have_the_same_defaults():
    given = main.parser().parse_args(["prune", "--model", "m", "--out", "o"])
    defaults = {name: p.default for name, p in inspect.signature(pipeline.prune).parameters.items()}
    shared = {name for name in vars(given) if name in defaults} - {"model", "text"}  # text means two things
    assert len(shared) == 15
    assert {name: getattr(given, name) for name in shared} == {name: defaults[name] for name in shared}
    measured = inspect.signature(quality.perplexity).parameters
    assert given.window == measured["window"].default
    tuning = lora.Settings()
    assert (given.epochs, given.kd_weight) == (tuning.epochs, tuning.kd_weight)


@pytest.mark.parametrize(("options", "arguments"), [
    ((), {}),
    (("--heads-removed", "same_share"), {"heads_removed": "same_share"}),
    (("--method", "none", "--criterion", "block_influence"), {"method": "none", "criterion": "block_influence"}),
    (("--reconstruct", "one_pass", "--reconstruction-text", "mini_calibration_text", "--reconstruction-samples", "6"),
     {"reconstruction": "one_pass", "reconstruction_text": "mini_calibration_text", "reconstruction_samples": 6})])
def test_command_and_function_give_the_same_model(prune, dense, tmp_path, options, arguments):
    assert prune(*options, "--text", "none", plain=())[0] == 0
    model, tokenizer = loading.load_model(str(dense))
    found = pipeline.prune(model, tokenizer, removed_fraction=0.2, calibration="mini_prompts", prompts=4, **arguments)
    assert same(weights(tmp_path / "small"), found.model.state_dict())


def test_a_bfloat16_folder_of_477088_bytes_comes_out_at_382624_and_not_in_float32_at_762120(call, tiny, tokenizer,
                                                                                               tmp_path):
    sizes = {"width": 64, "vocabulary": 300, "n_blocks": 3, "heads": 4, "groups": 2, "head_width": 16, "neurons": 280}
    tiny("llama", dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").stat().st_size == 477_088
    for dtype, size in (("auto", 382_624), ("float32", 762_120)):
        status, _, error = call("prune", "--model", tmp_path / "dense", "--out", tmp_path / dtype, "--removed-fraction",
                                "0.2", "--multiple-of", "1", "--dtype", dtype, *PLAIN, *QUICK, "--text", "none")
        assert status == 0, error
        assert (tmp_path / dtype / "model.safetensors").stat().st_size == size


def test_a_tokenizer_without_any_special_token_goes_all_the_way(prune, dense, tmp_path):
    """Nothing to pad with, to begin with or to end an answer with."""
    path = dense / "tokenizer.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "added_tokens": []}))
    (dense / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (dense / "special_tokens_map.json").unlink(missing_ok=True)
    assert not loading.load_model(str(dense))[1].all_special_tokens
    little = ("--recover-pairs", "4", "--epochs", "1")
    status, shown, error = prune("--recover", "mini_prompts", *little, "--json", plain=())
    assert status == 0, error
    measured = json.loads(shown)["measured"]
    assert list(measured) == ["dense", "pruned", "recovered"] and not measured["dense"]["bos_token"]
    assert not AutoTokenizer.from_pretrained(tmp_path / "small").all_special_tokens


# --- everything of one's own ------------------------------------------------------------------------------------------


def test_experts_are_removed_and_listed_by_block(call, tokenizer, tmp_path):
    folder = tmp_path / "experts"
    toy("qwen3_moe", vocab_size=128, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    status, said, error = call("inspect", folder)
    assert status == 0 and "4 experts of 20 neurons; both can be removed (--experts-removed" in said
    status, said, error = call("prune", "--model", folder, "--out", tmp_path / "small", "--experts-removed", "1",
                               *QUICK, "--json")
    facts = json.loads(said)
    assert status == 0 and facts["removed"]["experts"].keys() == {"0", "1"}, error
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_experts == 3 and facts["measured"]["pruned"]["perplexity"] > 0
    gone = int(facts["removed"]["experts"]["1"])
    stays = [e for e in range(4) if e != gone]
    dense_experts = weights(folder)["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(small.state_dict()["model.layers.1.mlp.experts.down_proj"], dense_experts[stays])


def test_prompts_answers_and_text_of_files_are_used(prune, dense, tmp_path):
    rows = [{"ask": f"Say {i}.", "reply": f"{i}", "n": i} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.txt").write_text("One paragraph of text.\n\nAnd another one, which is a little longer.")
    mine = f"{tmp_path / 'mine.jsonl'}"
    status, shown, error = prune("--recover", f"{mine}:ask,reply", "--epochs", "1", "--json", quick=(
        "--calibration", f"{mine}:ask", "--prompts", "5", "--text", tmp_path / "test.txt", "--window", "50"))
    assert status == 0, error
    facts = json.loads(shown)
    assert len(facts["steps"]) == 2 and "LoRA on 3 answers" in facts["steps"][1]
    assert facts["measured"]["recovered"]["tokens"] == 66 - 2  # of two windows, all but the first tokens
    model, tokenizer = loading.load_model(str(dense))
    prompts = data.batches([row["ask"] for row in rows[:5]], tokenizer)
    assert facts["removed"]["neurons"] == [" ".join(map(str, sorted(row.tolist()))) for row in pipeline.prune(
        model, prompts, removed_fraction=0.2).plan.neurons]
    status, _, error = prune("--recover", f"{mine}:ask,reply", "--calibration", f"{mine}:ask", out=tmp_path / "all")
    assert status == 0, error  # QUICK names four prompts
    status, _, error = prune("--recover", f"{mine}:ask,reply", "--calibration", f"{mine}:ask", "--prompts", "8",
                             out=tmp_path / "none")
    assert status == 1 and "no pairs beyond the first 8 prompts" in error


def test_a_score_and_a_criterion_of_ones_own_are_named_by_module_and_function(prune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scores.py").write_text(
        "import torch\n"
        "def last_first(model, batches):\n"
        "    assert batches[0]['input_ids'].ndim == 2\n"
        "    c = model.config\n"
        "    count = torch.arange(c.intermediate_size, 0, -1.0)\n"
        "    return torch.zeros(c.num_hidden_layers, c.num_attention_heads), count.expand(c.num_hidden_layers, -1)\n"
        "def middle(model, batches):\n"
        "    return ['model.layers.1']\n")
    status, shown, error = prune("--method", "my_scores:last_first", "--criterion", "my_scores:middle",
                                 "--blocks-removed", "1", "--json", fraction=("--removed-fraction", "0.3"))
    assert status == 0, error
    removed = json.loads(shown)["removed"]
    assert removed["blocks"] == ["model.layers.1"]
    went = list(map(int, removed["neurons"][0].split()))
    assert went == list(range(60 - len(went), 60))  # the lowest scores are the last ones
    status, _, error = prune("--method", "my_scores:nothing", out=tmp_path / "other")
    assert status == 1 and "'my_scores:nothing' cannot be loaded" in error


def test_measuring_can_be_left_out(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "perplexity", lambda *_, **__: pytest.fail("measured"))
    status, shown, _ = prune("--text", "none", "--json")
    assert status == 0 and json.loads(shown)["measured"] == {}
    assert "Measured" not in (tmp_path / "small" / "README.md").read_text()


def test_quiet_shows_results_and_no_progress(dense, tmp_path):
    """In a process of its own, without the variable that silences the bars of tests; both runs share its imports."""
    given = ["prune", "--model", dense, "--out", tmp_path / "small", "--removed-fraction", "0.2", *QUICK]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    code = ("import os, sys\nfrom pruning_lib.cli import main\n"
            "for name, more in (('quiet', ['-q']), ('loud', ['--out', 'b'])):\n"
            "    for number in (1, 2):\n"
            "        os.dup2(os.open(f'{name}{number}', os.O_CREAT | os.O_WRONLY), number)\n"
            "    assert main.main([*sys.argv[1:], *more]) == 0\n"
            "    sys.stdout.flush()\n")
    done = subprocess.run([sys.executable, "-c", code, *map(str, given)], cwd=tmp_path, env=environment)
    said, quiet, loud = ((tmp_path / name).read_text() for name in ("quiet1", "quiet2", "loud2"))
    assert done.returncode == 0 and "saved in" in said
    assert "%|" in loud and "measuring" in loud
    assert "%|" not in quiet and "it/s" not in quiet and "measuring" not in quiet


# --- refused before work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (("--criterion", "loss", "--blocks-removed", "1"), "--criterion loss needs labelled images"),
    (("--method", "none", "--criterion", "random", "--removed-fraction", "0.5", "--blocks-removed", "1"),
     "--blocks-removed 1 removes 0.2"),
    (("--method", "none", "--criterion", "random", "--removed-fraction", "0.01"), "less than half a block"),
    (("--method", "ampp"), "unknown method 'ampp'"), (("--criterion", "randm"), "nearest: random"),
    (("--device", "cuda:9"), "--device cuda:9 is not on this machine; give one of cpu"),
    (("--device", "gpu"), "--device gpu is not"), (("--dtype", "int3"), "--dtype int3; allowed"),
    (("--window", "513"), "the window has 513 tokens, the model was trained for 512 positions"),
    (("--calibration", "mini_text"), "'mini_text' is test text"), (("--text", "mini_prompts"), "no split 'test'"),
    (("--model", "smollm2-135m-instuct"), "nearest: smollm2-135m-instruct"), (("--model", "dens"), "folders: dense"),
    (("--model", "./dens"), "folders: dense"),
    (("--calibration", "mini_promts"), "nearest: mini_prompts"), (("--calibration", "no.jsonl"), "no.jsonl is no file"),
    (("--kd-weight", "0.5"), "--kd-weight 0.5 needs answers"),
    (("--tasks", "arc_eazy"), "no task or group 'arc_eazy'; nearest: arc_easy")])
def test_refused_before_the_model_is_scored(prune, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(amp, "score_sums", lambda *_, **__: pytest.fail("scored"))
    monkeypatch.chdir(tmp_path)
    status, shown, error = prune(*arguments)
    assert (status, shown) == (1, "") and message in error and "scope" not in error
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--tokens", "-100"), "'-100' is no number of tokens; give 2 or more, or all"), (("--tokens", "0"), "2 or more"),
    (("--tokens", "1"), "2 or more"), (("--prompts", "0"), "at least 1"),
    (("--heads-removed", "-1"), "same_share"), (("--removed-fraction", "20"), "from 0 to 1"),
    (("--reconstruct", "sequental"), "unknown 'sequental'; nearest: sequential"),
    (("--grouped-query", "whole"), "nearest: whole_groups"),
    (("--bloks-removed", "3"), "unknown option --bloks-removed; nearest: --blocks-removed, "),
    (("--tokes=9",), "unknown option --tokes; nearest: --tokens, ")])
def test_values_that_are_no_such_thing_are_wrong_usage(prune, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        prune(*arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_text_that_is_also_test_text_is_refused_unless_allowed(prune, tmp_path):
    (tmp_path / "all.txt").write_text("First paragraph.\n\nSecond paragraph, the longer one.")
    shared = ("--calibration", tmp_path / "all.txt", "--text", tmp_path / "all.txt", "--window", "20")
    status, _, error = prune(quick=shared)
    assert status == 1 and "--calibration: 2 of 2 texts are test text too" in error and "--allow-test-text" in error
    assert prune("--allow-test-text", quick=shared)[0] == 0


@pytest.mark.parametrize(("place", "message"), [
    ("link", "is a link"), (".", "is the current folder; give a new folder in it, such as --out pruned"),
    ("..", "is around the current folder"), ("dense", "is the folder of the model itself; give a new folder"),
    ("file", "is a file"), ("file/below", "is a file"), ("full", "not empty")])
def test_a_folder_that_cannot_take_the_checkpoint_is_refused_before_the_model_is_loaded(prune, tmp_path, monkeypatch,
                                                                                        place, message):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    for name in ("here", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    status, _, error = prune(out=place if place.startswith(".") else tmp_path / place)
    assert status == 1 and message in error and ("remove it" in error) == (place == "full")


def test_a_mount_point_is_refused_and_a_folder_in_it_is_taken(prune, small_disk, monkeypatch):
    status, _, error = prune(out=small_disk)
    assert status == 1 and "is a mount point; give a new folder in it" in error
    assert prune(out=small_disk / "small")[0] == 0


def test_a_disk_without_room_is_refused_before_the_model_is_scored(prune, tmp_path, monkeypatch):
    from pruning_lib.cli import out_folder

    monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(amp, "score_sums", lambda *_, **__: pytest.fail("scored"))
    status, _, error = prune()
    assert status == 1 and "GB are free; give a folder on another disk" in error


def test_a_second_run_says_what_to_do(prune, tmp_path):
    assert prune()[0] == 0
    status, _, error = prune()
    assert status == 1 and "has the result of this very command; measure it again with: pruning-lib evaluate" in error
    status, _, error = prune("--prompts", "5")
    assert status == 1 and "made with other options (--prompts 4)" in error


# --- nothing lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 2])
def test_measuring_that_fails_leaves_the_checkpoint_and_what_was_measured(prune, tmp_path, monkeypatch, fails_at):
    measure, calls = quality.perplexity, []

    def perplexity(*arguments, **options):
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return measure(*arguments, **options)

    monkeypatch.setattr(quality, "perplexity", perplexity)
    out = tmp_path / "small"
    status, _, error = prune()
    assert status == 1 and "measuring failed: out of memory" in error and f"pruning-lib evaluate {out}" in error
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() < 0.81 * loading.load_model(
        str(tmp_path / "dense"))[0].num_parameters()
    assert list(json.loads((out / "pruning.json").read_text())["measured"]) == ["dense"][:fails_at - 1]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_recovery_that_fails_leaves_the_pruned_model(prune, tmp_path, monkeypatch, error, capsys):
    def fail(*_, **__):
        raise error

    assert prune("--text", "none", out=tmp_path / "alone")[0] == 0
    monkeypatch.setattr(lora, "tune", fail)
    status, _, said = prune("--recover", "mini_prompts", "--text", "none")
    assert status == (1 if isinstance(error, RuntimeError) else 130)
    assert "The pruned model is saved in".lower() in said.lower() and "--resume" in said
    assert same(weights(tmp_path / "small"), weights(tmp_path / "alone"))


def test_a_tuned_model_replaces_the_pruned_one_and_leaves_nothing_beside(prune, tmp_path):
    assert prune("--text", "none", out=tmp_path / "alone")[0] == 0
    assert prune("--recover", "mini_prompts", "--recover-pairs", "4", "--epochs", "1")[0] == 0
    assert not same(weights(tmp_path / "small"), weights(tmp_path / "alone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "dense", "small"]
    assert list(json.loads((tmp_path / "small" / "pruning.json").read_text())["measured"]) == [
        "dense", "pruned", "recovered"]


def test_what_is_no_number_is_null_with_a_reason(prune, tmp_path, monkeypatch):
    values = {"perplexity": float("inf"), "perplexity_low": 3.0, "perplexity_high": float("nan"), "tokens": 5,
              "window": 8, "stride": 8, "bos_token": False}
    monkeypatch.setattr(quality, "perplexity", lambda *_, **__: dict(values))
    status, shown, _ = prune("--json")
    for text in (shown, (tmp_path / "small" / "pruning.json").read_text()):
        found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["measured"]["pruned"]
        assert found["perplexity"] is None and found["perplexity_reason"].startswith("infinite")
        assert found["perplexity_high"] is None and found["perplexity_high_reason"] == "not a number"
    assert status == 0 and "infinite" in (tmp_path / "small" / "README.md").read_text()
