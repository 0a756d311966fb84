"""A converted checkpoint is, in llama.cpp, the network that transformers runs; its numbers are those of the weights."""

import json
import os
import subprocess
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from sys import executable

import pytest
import torch
from conftest import build
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pruning_lib import data
from pruning_lib.models import checkpoints, families, gguf_export, gguf_types, surgery
from pruning_lib.pruning.selection import choose

gguf = pytest.importorskip("gguf")
# a Python that has xllamacpp: this one, or another one beside it
LLAMA_PYTHON = executable if find_spec("xllamacpp") else os.environ.get("PRUNING_LLAMA_PYTHON")
LLAMA = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 256, 1
parameters.cpuparams.n_threads, parameters.warmup, parameters.verbosity = 1, False, 3
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # half precision tips close calls
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
ask = lambda prompt: server.handle_completions({"prompt": prompt, "max_tokens": 24, "temperature": 0})
print("ANSWER" + json.dumps([ask(prompt)["choices"][0]["text"] for prompt in sys.argv[2:]]))
"""
PROMPTS = ["The capital of", "once upon 2024,  \u00e9t\u00e9", "a"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
         r"|\s+")


def byte_level(split=None, digits=False):
    inner = Tokenizer(BPE())
    steps = ([pre_tokenizers.Digits(individual_digits=True)] if digits else
             [pre_tokenizers.Split(__import__("tokenizers").Regex(split), "isolated")] if split else [])
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=400, special_tokens=["<|end|>", "<|im|>"], show_progress=False,
                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(data.texts("mini_text"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|end|>", eos_token="<|end|>",
                                   clean_up_tokenization_spaces=False)


def character_level():
    """As the tokenizers of Llama 2 and Phi-3 are laid out: bytes for what is unknown, a space in front, BOS."""
    trained = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator([text.replace("\n", " ").encode("ascii", "ignore").decode() for text in
                                 data.texts("mini_text")], BpeTrainer(vocab_size=500, special_tokens=special,
                                                                      max_token_length=6, show_progress=False))
    state = json.loads(trained.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < 3]
    inner = Tokenizer.from_str(json.dumps(state))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in ("<|user|>", "<|endoftext|>")])  # of Phi-3
    return tokenizer


TOKENIZERS = {"gpt-2": byte_level, "smollm": lambda: byte_level(digits=True), "qwen2": lambda: byte_level(SPLIT),
              "default": character_level}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 5e5}
# name -> family, query heads to remove, tokenizer, config fields
CASES = {
    "llama": ("llama", None, "smollm", {}),
    "llama_pruned": ("llama", 2, "gpt-2", {"tie_word_embeddings": True}),
    "llama_as_mistral": ("llama", 1, "default", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama_scaled": ("llama", 0, "default", {"rope_parameters": LLAMA3}),
    "llama_linear": ("llama", 0, "default", {"rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                                "rope_theta": 1e4}}),
    "llama_yarn": ("llama", 0, "default", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}}),
    "mistral": ("mistral", None, "default", {"sliding_window": None}),
    "mistral_pruned": ("mistral", 2, "default", {"sliding_window": None}),
    "qwen2": ("qwen2", None, "qwen2", {}),
    "qwen2_pruned": ("qwen2", 1, "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", None, "qwen2", {}),
    "qwen3_pruned": ("qwen3", 1, "qwen2", {}),
    "phi3": ("phi3", None, "default", {}),
    "phi3_pruned": ("phi3", 1, "default", {}),
}


def test_every_family_that_is_converted_is_compared_whole_and_with_heads_cut():
    compared = {(family, bool(heads)) for family, heads, _, _ in CASES.values()}
    assert compared == set(product(gguf_export.ARCHITECTURES, (True, False)))
    assert {fields.get("rope_parameters", {}).get("rope_type", "default") for _, _, _, fields in CASES.values()} >= {
        "default", "llama3", "linear", "yarn"}


def checkpoint(folder, case, random_importance):
    """A toy network whose next token is never a close call, whole or cut, in ``folder``."""
    family, heads, kind, fields = CASES[case]
    groups = 6 if heads in (0, 1) else 3
    tokenizer = TOKENIZERS[kind]()
    config = families.tiny(family, width=192, heads=6, groups=groups, head_width=32, neurons=320, vocabulary=512)
    stated = {**config.to_dict(), **fields, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None,
              "eos_token_id": tokenizer.eos_token_id}
    model = build(type(config)(**stated))
    for number in range(512):  # the two write halves of characters differently, and stop at other special tokens
        word = tokenizer.decode([number])
        if "\ufffd" in word or not word or number in tokenizer.get_added_vocab().values():
            model.get_output_embeddings().weight.data[number] = 0
    if heads is not None:
        model = surgery.remove(model, choose(random_importance(model), model, removed_fraction=0.2,
                                             heads_removed=heads, multiple_of=32))
    return checkpoints.save(model, tokenizer, folder)


def in_transformers(folder, prompts=PROMPTS):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        whole = tokenizer.decode(found[0], skip_special_tokens=True)
        texts.append(whole.removeprefix(tokenizer.decode(ids[0], skip_special_tokens=True)))
    return texts


def in_llama(path, prompts=PROMPTS):
    if not LLAMA_PYTHON:
        pytest.skip("xllamacpp is not installed; with it, or with PRUNING_LLAMA_PYTHON naming a Python that has it, "
                    "llama.cpp runs what was converted")
    done = subprocess.run([LLAMA_PYTHON, "-c", LLAMA, str(path), *prompts], capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers, done.stderr[-2000:]
    return json.loads(answers[0].removeprefix("ANSWER"))


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_greedy_text_of_transformers(tmp_path, random_importance, case):
    folder = checkpoint(tmp_path / "model", case, random_importance)
    path = gguf_export.export(folder, tmp_path / "model.gguf", format="f32").path
    assert in_llama(path) == in_transformers(folder)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_in_the_file_once_and_stated_sizes_are_those_of_the_weights(tmp_path, random_importance, case):
    folder = checkpoint(tmp_path / "model", case, random_importance)
    exported = gguf_export.export(folder, tmp_path / "model.gguf", format="q8_0")
    reader = gguf.GGUFReader(exported.path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rotary = {"rope_freqs.weight"}
    written = sum(int(t.n_elements) for t in reader.tensors if t.name not in rotary)
    assert written == sum(p.numel() for p in model.parameters())
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    assert kinds == {"Q8_0"} and exported.unquantised == () and exported.size_bytes == exported.path.stat().st_size
    arch = reader.get_field("general.architecture").contents()
    assert reader.get_field(f"{arch}.attention.key_length").contents() == families.head_width(model) == 32
    assert reader.get_field("tokenizer.ggml.pre").contents() == CASES[case][2]
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    weight = model.get_input_embeddings().weight.detach()
    error = torch.from_numpy(gguf.quants.dequantize(embedding.data, embedding.tensor_type)) - weight
    assert error.abs().max() <= weight.abs().max() / 127  # half a step of a block of 32, and its scale's rounding


def test_a_row_that_is_no_multiple_of_32_is_float16_and_named(tmp_path, tiny, random_importance):
    model = build(families.tiny("llama", width=192, heads=6, groups=3, head_width=32, neurons=150, vocabulary=512))
    folder = checkpoints.save(model, byte_level(), tmp_path / "model")
    exported = gguf_export.export(folder, tmp_path / "model.gguf")
    assert exported.unquantised == tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(2))


# of SmolLM2-135M (30 blocks, tied embeddings, width 576, 1,536 neurons), as llama-quantize itself chose them
@pytest.mark.parametrize(("name", "columns", "format", "kind"), [
    ("token_embd.weight", 576, "q4_k_m", "Q8_0"), ("token_embd.weight", 2048, "q4_k_m", "Q6_K"),
    ("blk.0.ffn_down.weight", 1536, "q4_k_m", "Q6_K"), ("blk.3.ffn_down.weight", 1536, "q4_k_m", "Q4_K"),
    ("blk.0.attn_v.weight", 576, "q4_k_m", "Q8_0"), ("blk.3.attn_q.weight", 576, "q4_k_m", "Q5_0"),
    ("blk.3.attn_q.weight", 576, "q5_k_m", "Q5_1"), ("blk.3.ffn_down.weight", 1017, "q6_k", "F16")])
def test_types_are_mixed_as_llama_quantize_mixes_them(name, columns, format, kind):
    assert gguf_types.type_of(name, columns, format, blocks=30, tied=True) == kind


@pytest.mark.parametrize(("change", "message"), [
    ({"format": "q4_k"}, "q4_k.*allowed: f32, f16, bf16, q8_0"),
    ({"model_type": "gemma"}, "'gemma' is not converted here.*llama, mistral, qwen2, qwen3, phi3.*convert_hf_to_gguf"),
    ({"tokenizer": False}, "no tokenizer that can be converted"),
    ({"rule": {"type": "Whitespace"}}, "of a kind that is not converted here.*Whitespace")])
def test_what_cannot_be_converted_is_refused_and_nothing_is_left(tmp_path, random_importance, change, message):
    folder = checkpoint(tmp_path / "model", "llama", random_importance)
    config, tokenizer = folder / "config.json", folder / "tokenizer.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": change.get("model_type", "llama")}))
    if "rule" in change:
        tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "pre_tokenizer": change["rule"]}))
    if "tokenizer" in change:
        tokenizer.unlink()
    with pytest.raises(ValueError, match=message):
        gguf_export.export(folder, tmp_path / "model.gguf", format=change.get("format", "q8_0"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="mine.gguf exists"):
        gguf_export.export(tmp_path, tmp_path / "mine.gguf")
    assert Path(tmp_path / "mine.gguf").read_text() == "mine"


@pytest.mark.model
def test_trained_blocks_pruned_by_20_percent_are_almost_as_much_smaller(tmp_path, short_smollm, random_importance):
    model, tokenizer = short_smollm
    plan = choose(random_importance(model), model, removed_fraction=0.2, heads_removed=0)
    sizes = {}
    for name, network in (("dense", model), ("pruned", surgery.remove(model, plan))):
        folder = checkpoints.save(network, tokenizer, tmp_path / name, verify=False)
        exported = gguf_export.export(folder, tmp_path / f"{name}.gguf")
        sizes[name] = exported.size_bytes
        assert not exported.unquantised
    assert 0.185 < 1 - sizes["pruned"] / sizes["dense"] < 0.205
    prompts = ["The capital of France is", "Once upon a time, there were 123 cats"]
    path = gguf_export.export(tmp_path / "dense", tmp_path / "whole.gguf", format="f32").path
    assert in_llama(path, prompts) == in_transformers(tmp_path / "dense", prompts)
