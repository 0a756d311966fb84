"""What one supported transformers saved, the other one reads as the same network, with no code of ours."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build
from safetensors.torch import save_file
from transformers import AutoTokenizer

from pruning_lib.models import checkpoints, families, loading, surgery
from pruning_lib.pruning.selection import choose

COMPAT = Path(os.environ.get("PRUNING_COMPAT") or Path(__file__).resolve().parents[2] / "build" / "compat")
OLD = transformers.__version__.startswith("4.")
READ = """
import json, sys
sys.modules["pruning_lib"] = None
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected, found = load_file("expected.safetensors"), {"version": transformers.__version__}
for name in sys.argv[1:]:
    dtype = AutoModelForCausalLM.from_pretrained(name, dtype="auto").dtype
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        difference = (model(expected["ids"]).logits - expected[name]).abs().max().item()
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    found[name] = [difference, str(dtype), tied]
json.dump(found, open("found.json", "w"))
"""
ROTARY = {"base": {"rope_type": "default"},
          "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
          "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
          "linear": {"rope_type": "linear", "factor": 2.0}}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = list(product(ROTARY, (True, False), DTYPES))
TAKEN_BY_4 = {"phi3": ("base",), "olmo": ("base", "linear")}  # 4 refuses other scaling for these
IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(3))


def other_version():
    """Environment of a process that imports the other transformers; a skip where there is none."""
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p) != COMPAT]
    if not OLD and not COMPAT.is_dir():
        pytest.skip("no second transformers beside this one; `make compat` installs it in build/compat")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths if OLD else [str(COMPAT), *paths])}


def rotary(family, name, theta=500_000.0):
    """Return the fields of a config in this version's own form."""
    if OLD:
        key = "type" if family == "olmo" else "rope_type"
        scaling = {{"rope_type": key}.get(k, k): v for k, v in ROTARY[name].items()}
        return {"rope_theta": theta, "rope_scaling": None if name == "base" else scaling}
    return {"rope_parameters": {**ROTARY[name], "rope_theta": theta}}


def network(family, name, tied, dtype, random_importance):
    """A toy network of these, one of six heads cut: a LLaMA of five is stored as Mistral."""
    config = families.tiny(family, width=48, vocabulary=128, heads=6, groups=6, neurons=64)
    fields = {**config.to_dict(), **rotary(family, name), "tie_word_embeddings": tied}
    if "partial_rotary_factor" in config.to_dict().get("rope_parameters", {}) and not OLD:
        fields["rope_parameters"]["partial_rotary_factor"] = config.rope_parameters["partial_rotary_factor"]
    model = build(type(config)(**fields))
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype).float()  # computed in float32, as a float16 checkpoint is on a CPU
    model.stored_dtype = dtype
    if tied:
        model.tie_weights()
    heads = int(tied)  # a whole LLaMA stays one
    plan = choose(random_importance(model), model, removed_fraction=0.1, heads_removed=heads, multiple_of=8)
    return surgery.remove(model, plan)


@pytest.fixture(scope="module")
def reread(tmp_path_factory, random_importance):
    """folder -> (difference of logits, dtype, tied?) in the other version."""
    folder, environment, expected = tmp_path_factory.mktemp("portable"), other_version(), {"ids": IDS}
    for family, (name, tied, dtype) in product(families.FAMILIES, CASES):
        if name not in TAKEN_BY_4.get(family, ROTARY):
            continue
        model = network(family, name, tied, dtype, random_importance)
        key = f"{family}-{name}-{'tied' if tied else 'untied'}-{str(dtype)[6:]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "SHARD_BYTES", 20_000 if dtype == torch.bfloat16 else 1 << 30)
            checkpoints.save(model, None, folder / key, verify=False)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            expected[key] = model(IDS).logits
    assert len(list((folder / "llama-base-tied-bfloat16").glob("model-*.safetensors"))) > 2
    save_file(expected, folder / "expected.safetensors")
    keys = [key for key in expected if key != "ids"]
    done = subprocess.run([sys.executable, "-c", READ, *keys], cwd=folder, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    assert found.pop("version").startswith("4.") != OLD
    return found


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_other_transformers_reads_the_same_numbers(reread, family):
    mine = {key: found for key, found in reread.items() if key.split("-")[0] == family}
    assert len(mine) == 6 * len(TAKEN_BY_4.get(family, ROTARY))
    assert not {key: found[0] for key, found in mine.items() if not found[0] < 2e-4}
    assert all(found[1:] == [f"torch.{key.split('-')[3]}", key.split("-")[2] == "tied"] for key, found in mine.items())


# --- a folder in, a folder out ----------------------------------------------------------------------------------------


@pytest.fixture
def source(request, tmp_path, tiny, tokenizer):
    """A folder as on the hub: bfloat16, tokenizer.model, chat template, no padding token, an odd generation config."""
    folder = tmp_path / "source"
    model = tiny(getattr(request, "param", "llama"), dtype=torch.bfloat16, heads=4, groups=2, neurons=96)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = {k: v for k, v in json.loads((folder / "tokenizer_config.json").read_text()).items() if k != "pad_token"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(b"sentences")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "do_sample": false}')
    return folder


def pruned(folder, out, random_importance, **how):
    model, tokenizer = loading.load_model(str(folder), **how)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves a state behind
    plan = choose(random_importance(model), model, removed_fraction=0.1)
    return checkpoints.save(surgery.remove(model, plan), tokenizer, out)


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def size_of_numbers(folder):
    """Return the bytes of the weights alone: a file begins with the length of its header and the header."""
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
               for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_keeps_its_number_format_and_gets_smaller(tmp_path, source, random_importance, stored):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, stored))
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(source)
    loaded, _ = loading.load_model(str(source), device="cpu")
    assert loaded.dtype == (torch.float32 if stored == "float16" else getattr(torch, stored))
    out = pruned(source, tmp_path / "out", random_importance, device="cpu")
    assert size(out) < size(source)
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {str(p.dtype) for p in again.parameters()} == {f"torch.{stored}"}
    assert size_of_numbers(out) == sum(p.numel() * p.element_size() for p in again.parameters())
    wanted = pruned(source, tmp_path / "wide", random_importance, device="cpu", dtype="float32")
    assert size(wanted) > 1.8 * size(out) or stored == "float32"


@pytest.mark.parametrize("source", ["llama", "phi3"], indirect=True)
def test_files_of_the_tokenizer_and_the_generation_config_come_out_as_they_went_in(tmp_path, source, random_importance):
    out = pruned(source, tmp_path / "out", random_importance)
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    stated = json.loads((out / "tokenizer_config.json").read_text())
    assert "pad_token" not in stated and stated["chat_template"] == "{{ messages }}"
    assert stated["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(out).pad_token is None
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.9, 0.6)


def test_a_tokenizer_that_was_changed_is_saved_changed_and_keeps_the_other_files(tmp_path, source, tiny):
    _, tokenizer = loading.load_model(str(source))
    tokenizer.add_tokens(["<new>"])
    out = checkpoints.save(tiny("llama"), tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<new>") == len(tokenizer) - 1
    assert (out / "tokenizer.model").is_file() and AutoTokenizer.from_pretrained(out).pad_token is None


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_embeddings_are_stated_as_tied_when_they_are_one_matrix(tmp_path, tiny, random_importance, flag, same):
    """The flag may say otherwise: after tuning by hand, or in a config that was edited."""
    model = tiny("llama", heads=4, groups=4, neurons=96)
    if same:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = flag
    plan = choose(random_importance(model), model, removed_fraction=0.1, heads_removed=1, multiple_of=1)
    out = checkpoints.save(surgery.remove(model, plan), None, tmp_path / "out")  # verified by reloading
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    first, last = (part().weight for part in (again.get_input_embeddings, again.get_output_embeddings))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == same
    assert (first.data_ptr() == last.data_ptr()) == same and torch.equal(last, model.lm_head.weight)
