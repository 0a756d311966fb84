"""The card says where a model comes from, and what somebody wrote into it stays."""

import json

import pytest

from pruning_lib.cli import card, hub, main
from pruning_lib.models import deployment, loading


@pytest.fixture
def source(tmp_path, tiny, tokenizer):
    folder = tmp_path / "source"
    tiny("qwen2", heads=6, groups=3, neurons=96).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/first\n---\n# A model\nlicense: none\n")
    return folder


def prune(source, out, *more):
    return main.main(["prune", "--model", str(source), "--removed-fraction", "0.1", "--calibration", "mini_prompts",
                      "--prompts", "3", "--text", "none", "--reconstruct", "none", "--out", str(out), *more])


def test_the_card_states_base_model_licence_and_task_and_invents_none(tmp_path, source):
    assert prune(source, tmp_path / "a") == 0
    head = (tmp_path / "a" / "README.md").read_text().split("---\n")[1]
    for line in ("library_name: transformers", "pipeline_tag: text-generation", "base_model: org/first",
                 "license: mit"):
        assert line in head.splitlines()
    (source / "README.md").unlink()
    assert prune(source, tmp_path / "b") == 0
    assert "base_model" not in (text := (tmp_path / "b" / "README.md").read_text()) and "license:" not in text
    assert "Weights are float32." in text and json.loads((tmp_path / "b" / "pruning.json").read_text())[
        "stored_dtype"] == "float32"


def test_the_default_model_has_its_name_on_the_hub():
    assert loading.MODELS["smollm2-135m-instruct"].base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(("change", "renewed"), [
    (lambda text: text + "\nMy own words.\n", True),
    (lambda text: text.replace("license: mit", "license: other"), True),
    (lambda text: text.replace("## Load it", "## How I load it"), False), (lambda text: "# Mine\n", False)])
def test_what_somebody_wrote_into_a_card_stays_and_the_rest_is_renewed(tmp_path, source, change, renewed):
    assert prune(source, tmp_path / "a") == 0
    path = tmp_path / "a" / "README.md"
    path.write_text(mine := change(path.read_text()))
    facts = json.loads((tmp_path / "a" / "pruning.json").read_text())
    card.write_card(tmp_path / "a", {**facts, "steps": ["another step"]})
    assert json.loads((tmp_path / "a" / "pruning.json").read_text())["steps"] == ["another step"]
    text = path.read_text()
    assert ("another step" in text) == renewed and (text == mine) != renewed
    for word in ("My own words.", "license: other"):
        assert (word in mine) == (word in text)


def test_an_upload_is_refused_before_work_starts_without_a_token_or_with_a_name_that_is_none(
        tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert prune(source, tmp_path / "a", "--push-to-hub", "me/smaller") == 1
    assert "no token; log in once with: hf auth login" in capsys.readouterr().err and not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="ORG/NAME"):
        hub.refuse_upload("smaller")


def test_programs_that_take_no_fewer_heads_are_named_before_pruning(tmp_path, source, capsys):
    assert main.main(["inspect", str(source)]) == 0
    assert deployment.head_width_note("qwen2") in capsys.readouterr().out
    assert prune(source, tmp_path / "a", "--heads-removed", "2") == 0
    assert "vLLM" in capsys.readouterr().err
    assert prune(source, tmp_path / "b") == 0 and "vLLM" not in capsys.readouterr().err
    assert deployment.head_width_note("llama") == ""


def test_a_gguf_file_is_no_model_to_inspect_and_export_says_what_became_of_the_rows(tmp_path, source, capsys):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert main.main(["inspect", str(tmp_path / "x.gguf")]) == 1
    assert "x.gguf is a file; give the folder of a checkpoint" in capsys.readouterr().err
    assert main.main(["export", str(source), "--out", str(tmp_path / "x.gguf")]) == 1
    assert "x.gguf exists" in capsys.readouterr().err
