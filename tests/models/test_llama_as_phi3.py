"""A LLaMA and the equivalent Phi-3 with fused matrices: scores, plans and pruned logits agree."""

import pytest
import torch

from pruning_lib import data
from pruning_lib.models import checkpoints, surgery
from pruning_lib.models.llama_as_phi3 import as_phi3
from pruning_lib.pruning import amp, selection


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


def test_what_has_no_phi3_is_refused(tiny):
    with pytest.raises(ValueError, match="qwen2.*give a LLaMA without biases"):
        as_phi3(tiny("qwen2"))
