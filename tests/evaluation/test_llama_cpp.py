"""Losses, speed and memory of GGUF files in llama.cpp, against transformers."""

import pytest
from test_gguf_export import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning_lib import data
from pruning_lib.evaluation import llama_cpp, quality
from pruning_lib.models import gguf_export

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (extra gguf)")


@pytest.fixture
def stored(tmp_path, random_importance):
    def of(case, format="f32"):
        folder = tmp_path / case
        if not folder.exists():
            checkpoint(folder, case, random_importance)
        path = tmp_path / f"{case}-{format}.gguf"
        return folder, path if path.exists() else gguf_export.export(folder, path, format=format).path
    return of


@pytest.mark.parametrize("case", ["llama_pruned", "llama_as_mistral", "qwen2"])  # the second one begins with BOS
def test_the_losses_of_windows_are_those_of_transformers(stored, case):
    folder, path = stored(case)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = data.texts("mini_text", 4, split="test")
    wanted = quality.perplexity(model, tokenizer, texts, window=48, stride=48, max_tokens=200, progress=False)
    windows, characters = llama_cpp.windows(tokenizer, texts, window=48, tokens=200)
    found = llama_cpp.losses(path, windows, bos=wanted["bos_token"])
    truth = llama_cpp.WindowLosses.unpack(wanted["windows"])
    assert found.tokens.tolist() == truth.tokens.tolist()
    assert found.losses == pytest.approx(truth.losses, rel=2e-3)  # keys and values are kept in float16
    if wanted["nats_per_character"]:
        assert found.losses.sum() / characters == pytest.approx(wanted["nats_per_character"], rel=2e-3)


def test_files_take_turns_and_a_smaller_type_takes_less_memory_to_read(stored):
    paths = {format: stored("llama", format)[1] for format in ("f32", "q8_0")}
    found = llama_cpp.speed(paths, prompt_tokens=8, new_tokens=4, repetitions=6)
    assert list(found) == ["f32", "q8_0"]
    assert all(len(t.prefill_s) == len(t.token_s) == 6 and min(t.token_s) > 0 for t in found.values())
    memory = llama_cpp.memory_bytes(paths["f32"], prompt_tokens=8, new_tokens=4)
    assert memory is None or memory > paths["f32"].stat().st_size / 2  # weights that were read
    full, small = (llama_cpp.bytes_per_token(path) for path in paths.values())
    assert 3.5 < full / small < 4  # 34 bytes instead of 128 for 32 numbers; vectors are float32 in both
    per_token = llama_cpp.bytes_per_token(paths["f32"], context=1) - full
    assert per_token == 2 * 2 * 2 * 3 * 32  # keys and values, two bytes, two blocks, three groups of width 32


def test_an_embedding_that_is_not_the_output_does_not_count(stored):
    untied, tied = (llama_cpp.bytes_per_token(stored(case)[1]) for case in ("llama", "llama_pruned"))
    model = AutoModelForCausalLM.from_pretrained(stored("llama")[0])
    assert untied == sum(p.nbytes for p in model.parameters()) - 4 * 512 * 192
    assert tied == sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(stored("llama_pruned")[0]).parameters())


def test_a_broken_file_is_an_error_with_the_reason(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="cannot open|failed"):
        llama_cpp.losses(tmp_path / "broken.gguf", [[1, 2, 3]])
    with pytest.raises(ValueError, match="repetitions=2.*at least 1, 1 and 6"):
        llama_cpp.speed({}, repetitions=2)
