"""Sizes and cuts read from headers are those of the network that transformers builds, or are not read from headers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pruning_lib.models import families
from pruning_lib.models.skeletons import skeleton
from pruning_lib.pruning.selection import lossless_cuts


def parameters(model):
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_cuts_and_parameters_are_those_of_transformers(family, tied, tiny, tmp_path):
    tiny(family, heads=6, groups=3, n_blocks=3, fields={"tie_word_embeddings": tied}).save_pretrained(tmp_path)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    found = skeleton(tmp_path)
    assert parameters(found) == parameters(whole) and {p.device.type for p in found.parameters()} == {"meta"}
    assert families.sizes(found) == families.sizes(whole) and lossless_cuts(found) == lossless_cuts(whole)


def test_heads_of_a_model_that_was_cut_have_the_width_they_had(tiny, tmp_path):
    tiny("mistral", heads=4, groups=2, head_width=24).save_pretrained(tmp_path)
    s = families.sizes(skeleton(tmp_path))
    assert (s.heads, s.groups, s.head_width, s.width) == (4, 2, 24, 48)


def test_a_config_that_leaves_the_width_of_a_head_to_the_weights_has_a_skeleton(tiny, tmp_path):
    tiny("llama", heads=6, groups=3).save_pretrained(tmp_path)
    before = lossless_cuts(skeleton(tmp_path))
    rewrite(tmp_path, lambda fields, _: [fields.pop(name) for name in ("head_dim", "attention_bias", "mlp_bias")])
    assert lossless_cuts(skeleton(tmp_path)) == before


def rewrite(folder, change):
    """Change the fields of the config and the tensors of a checkpoint."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    fields, tensors = json.loads(config.read_text()), load_file(weights)
    change(fields, tensors)
    config.write_text(json.dumps(fields))
    save_file(tensors, weights)


DOUBTS = {
    "another type": lambda fields, _: fields.update(model_type="gemma3_text"),
    "no tie stated": lambda fields, _: fields.pop("tie_word_embeddings"),
    "other neurons": lambda fields, _: fields.update(intermediate_size=50),
    "other heads": lambda fields, _: fields.update(num_attention_heads=3),
    "other blocks": lambda fields, _: fields.update(num_hidden_layers=3),
    "quantized": lambda fields, _: fields.update(quantization_config={"bits": 4}),
    "opened as another family": lambda fields, _: fields.update(num_attention_heads=5, head_dim=8),
    "no output": lambda _, tensors: tensors.pop("lm_head.weight"),
    "a norm missing": lambda _, tensors: tensors.pop("model.layers.1.input_layernorm.weight"),
    "a projection missing": lambda _, tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"),
    "a head for values": lambda _, tensors: tensors.update({"v_head.weight": torch.zeros(1, 48)}),
    "one more bias": lambda _, tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(5)}),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_where_a_doubt_remains_transformers_decides(doubt, tiny, tmp_path):
    tiny("llama", heads=6, groups=3).save_pretrained(tmp_path)
    assert skeleton(tmp_path) is not None
    rewrite(tmp_path, DOUBTS[doubt])
    assert skeleton(tmp_path) is None


def test_buffers_that_older_versions_stored_are_no_parameters(tiny, tmp_path):
    tiny("llama", heads=6, groups=3).save_pretrained(tmp_path)
    before = parameters(skeleton(tmp_path))
    rewrite(tmp_path, lambda _, tensors: tensors.update(
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}))
    assert parameters(skeleton(tmp_path)) == before


def test_a_folder_without_config_or_weights_has_none(tmp_path):
    assert skeleton(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert skeleton(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert skeleton(tmp_path) is None


def test_inspecting_a_folder_imports_no_transformers(dense):
    code = (f"import sys\nfrom pruning_lib.cli import main\nassert main.main(['inspect', {str(dense)!r}]) == 0\n"
            f"print([m for m in ('transformers', 'torchvision', 'scipy.stats', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]" and "6 heads in 3 groups" in done.stdout
