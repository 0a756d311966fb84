"""Checkpoints plain transformers refuses or misreads open here, or are refused with the way out."""

import json

import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pruning_lib.models import checkpoints, families, loading, opening, surgery
from pruning_lib.pruning import amp
from pruning_lib.pruning.pipeline import prune
from pruning_lib.pruning.selection import choose

IDS = torch.tensor([[5, 6, 7, 8]])


def odd_llama(tiny, tokenizer, folder, **changes):
    """Write a LLaMA of width 64 with 5 heads of 12 as older versions of transformers did; return the logits it has."""
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12,
              "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0}
    mistral = build(tiny("mistral", heads=5, groups=5, head_width=12, width=64).config)
    mistral.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = {**LlamaConfig(**fields).to_dict(), "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 12,
              "max_position_embeddings": 128, "rope_parameters": mistral.config.rope_parameters, **changes}
    config = {k: v for k, v in config.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with torch.no_grad():
        return mistral(IDS).logits


@pytest.mark.parametrize("head_dim", [12, "absent"])
def test_a_llama_whose_heads_do_not_divide_its_width_opens_and_is_pruned_further(head_dim, tiny, tokenizer, tmp_path,
                                                                                random_importance):
    expected = odd_llama(tiny, tokenizer, tmp_path, head_dim=head_dim)
    with pytest.raises(Exception, match="multiple of the number of attention heads|hidden size"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model, _ = loading.load_model(str(tmp_path), device="cpu")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    plan = choose(random_importance(model), model, removed_fraction=0.2, heads_removed=1)
    pruned = surgery.remove(model, plan)
    checkpoints.save(pruned, tokenizer, tmp_path / "cut")  # reloads it and compares bit for bit
    assert families.sizes(loading.load_model(str(tmp_path / "cut"), device="cpu")[0]).heads == 4


def test_such_a_llama_with_biases_is_refused_with_the_reason(tiny, tokenizer, tmp_path):
    odd_llama(tiny, tokenizer, tmp_path, attention_bias=True)
    with pytest.raises(ValueError, match="5 heads do not divide the width 64.*attention_bias"):
        loading.load_model(str(tmp_path), device="cpu")


def test_tensors_beside_the_network_are_ignored_and_those_of_other_blocks_are_not(tiny, tokenizer, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    extra = {"v_head.summary.weight": torch.ones(1, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(loading.load_model(str(tmp_path), device="cpu")[0](IDS).logits, model(IDS).logits)
    more = {"model.layers.2.mlp.up_proj.weight": torch.ones(24, 48)}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the config has no place for model.layers.2"):
        loading.load_model(str(tmp_path), device="cpu")


def test_an_adapter_is_refused_with_the_way_out_and_merged_on_request(tiny, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                                          init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
    with pytest.raises(ValueError, match="holds an adapter of .*base.*merge_and_unload.*--merge-adapter"):
        loading.load_model(str(tmp_path / "adapter"), device="cpu")
    model, tok = loading.load_model(str(tmp_path / "adapter"), device="cpu", merge_adapter=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert tok is not None and families.sizes(model) == families.sizes(base)


def test_a_folder_with_a_model_of_its_own_is_no_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert opening.adapter_base(tmp_path) == ""
    (tmp_path / "config.json").write_text("{}")
    assert opening.adapter_base(tmp_path) is None


def test_a_model_in_several_dtypes_is_refused_before_anything_is_written(tiny, tmp_path):
    model = tiny("llama")
    model.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16, float32.*model.to\(torch.bfloat16\)"):
        checkpoints.save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def lora():
    return pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"])


@pytest.mark.parametrize(("change", "message"), [
    (lambda model: model.lm_head.to(torch.bfloat16), r"several dtypes \(bfloat16, float32\).*model.to"),
    (lambda model: pytest.importorskip("peft").inject_adapter_in_model(lora(), model), "adapters .*merge_and_unload"),
    (lambda model: model.add_adapter(lora()), "adapters are .*merge_and_unload")])
def test_a_model_in_memory_that_could_not_be_saved_is_refused_before_it_is_scored(change, message, tiny, monkeypatch):
    model = tiny("llama")
    change(model)
    monkeypatch.setattr(amp, "score_sums", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(ValueError, match=message):
        prune(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], removed_fraction=0.1)
