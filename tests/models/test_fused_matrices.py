"""A LLaMA and the equivalent Phi-3 with fused matrices: scores, plans and pruned logits agree."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from pruning_lib import data
from pruning_lib.models import checkpoints, surgery
from pruning_lib.pruning import amp, selection

FUSED = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}  # fused matrix: its parts


def as_phi3(llama):
    """Return a Phi-3 with the weights of a LLaMA without biases, and the same logits up to rounding."""
    weights = dict(llama.state_dict())
    for i in range(llama.config.num_hidden_layers):
        for fused, parts in FUSED.items():
            weights[f"model.layers.{i}.{fused}.weight"] = torch.cat(
                [weights.pop(f"model.layers.{i}.{part}.weight") for part in parts])
    other = {"model_type": "phi3", "architectures": None, "sliding_window": None}
    config = Phi3Config(**{**llama.config.to_dict(), **other})
    model = AutoModelForCausalLM.from_config(config, dtype=llama.dtype).eval()
    model.load_state_dict(weights)
    return model


def assert_agree(llama, batches, *, heads_removed, cut, folder):
    phi3, ids = as_phi3(llama), batches[0]["input_ids"]
    scores = [amp.importance(m, batches, progress=False) for m in (llama, phi3)]
    torch.testing.assert_close(scores[1].neurons, scores[0].neurons, rtol=1e-4, atol=1e-6)
    plans = [selection.choose(scores[0], m, removed_fraction=0.2, heads_removed=heads_removed, grouped_query=cut)
             for m in (llama, phi3)]
    own = selection.choose(scores[1], phi3, removed_fraction=0.2, heads_removed=heads_removed, grouped_query=cut)
    assert torch.equal(own.heads, plans[0].heads) and torch.equal(own.neurons, plans[0].neurons)
    assert plans[0].removed_parameters == own.removed_parameters
    pruned = [surgery.remove(m, plan) for m, plan in zip((llama, phi3), plans, strict=True)]
    with torch.no_grad():
        for a, b in ((llama, phi3), pruned):
            torch.testing.assert_close(b(ids).logits, a(ids).logits, rtol=1e-4, atol=1e-3)
    assert pruned[1].config.model_type == "phi3"
    checkpoints.save(pruned[1], None, folder)  # reloads with plain transformers and compares bit for bit


@pytest.mark.parametrize(("cut", "heads_removed"), [("whole_groups", 2), ("equal_queries", 3)])
def test_a_toy_llama_and_its_phi3_lose_the_same(tiny, tmp_path, cut, heads_removed):
    llama = tiny("llama", heads=6, groups=3, neurons=80)
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert_agree(llama, batches, heads_removed=heads_removed, cut=cut, folder=tmp_path / "stored")


@pytest.mark.model
def test_trained_blocks_and_their_phi3_lose_the_same(short_smollm, tmp_path):
    llama, tokenizer = short_smollm
    batches = data.batches(data.texts("mini_prompts", 4), tokenizer)
    assert_agree(llama, batches, heads_removed=3, cut="whole_groups", folder=tmp_path / "stored")
