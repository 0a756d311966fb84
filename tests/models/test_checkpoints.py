"""A saved checkpoint gives the same logits bit for bit in plain transformers, in a process without pruning_lib."""

import copy
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
import torchvision
import transformers
from conftest import build, image_network, pixels
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pruning_lib.models import checkpoints, families, loading, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.plan import Plan
from pruning_lib.models.toy_models import toy
from pruning_lib.pruning.selection import choose

OLD = transformers.__version__.startswith("4.")
STOCK = """
import json, sys
sys.modules["pruning_lib"] = None  # importing it fails from here on
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected, found = load_file("expected.safetensors"), {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    found[name] = [torch.equal(logits, expected[name]), str(logits.dtype), model.config.model_type]
try:
    import pruning_lib
except ImportError:
    json.dump(found, open("found.json", "w"))
"""

# case -> sizes of the dense model, query heads to remove, cut, dtype, config fields
CASES = {
    "heads_divide_the_width": ({"heads": 6, "groups": 3}, 2, "whole_groups", torch.float32, {}),
    "heads_do_not_divide_it": ({"heads": 6, "groups": 6}, 1, "whole_groups", torch.float32, {}),  # 5 of 48
    "fewer_queries_per_group": ({"heads": 12, "groups": 3}, 3, "equal_queries", torch.float32, {}),  # 9 of 48
    "bfloat16_tied": ({"heads": 6, "groups": 6}, 1, "whole_groups", torch.bfloat16, {"tie_word_embeddings": True}),
    "heads_all_stay": ({"heads": 6, "groups": 3}, 0, "whole_groups", torch.float32, {}),
    "blocks": ({"heads": 6, "groups": 3}, None, "whole_groups", torch.float32, {}),
    "blocks_after_heads": ({"heads": 6, "groups": 6}, 1, "whole_groups", torch.float32, {}),  # 5 of 48
    "heads_after_blocks": ({"heads": 6, "groups": 3}, 2, "whole_groups", torch.float32, {}),
}
# full attention and a window of four tokens alternate, if the family allows it, so blocks are not exchangeable
WINDOWED = {"use_sliding_window": True, "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.skipif(OLD, reason="transformers 4 has no config that states sizes per block; 5 has one")
def test_blocks_of_different_sizes_still_have_no_plain_checkpoint():
    """Verify a statement of the pages on allocation; if this fails, plans may remove more from some blocks."""
    config = families.tiny("llama")
    fields = {**config.to_dict(), "per_layer_config": {0: {"intermediate_size": 8}}}
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_config(type(config)(**fields))
    model = AutoModelForCausalLM.from_config(type(config)(**fields, allow_global_per_layer_attribute_access=True))
    assert {block.mlp.up_proj.out_features for block in model.model.layers} == {config.intermediate_size}


def pruned(tiny, random_importance, name, case):
    sizes, heads, cut, dtype, fields = CASES[case]
    if "blocks" in case:
        sizes, fields = {**sizes, "n_blocks": 4}, WINDOWED if name.startswith("qwen") else {}
    model = tiny(name, dtype=dtype, fields=fields, neurons=150, **sizes)
    if case in ("blocks", "heads_after_blocks"):
        model = without_blocks(model)
    if heads is not None:
        plan = choose(random_importance(model), model, removed_fraction=0.3, heads_removed=heads, grouped_query=cut)
        model = surgery.remove(model, plan)
    return without_blocks(model) if case == "blocks_after_heads" else model


def without_blocks(model):
    return surgery.remove(model, BlockPlan.of(model, ["model.layers.0", "model.layers.2"]))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, tiny, random_importance):
    """Return folder name -> [equal?, dtype, model type], computed by one process with plain transformers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    expected = {"ids": IDS}
    for family in families.FAMILIES:
        for case in CASES:
            model = pruned(tiny, random_importance, family, case)
            checkpoints.save(model, None, folder / f"{family}-{case}", verify=False)
            with torch.no_grad():
                expected[f"{family}-{case}"] = model(IDS).logits
    save_file(expected, folder / "expected.safetensors")
    names = [name for name in expected if name != "ids"]
    done = subprocess.run([sys.executable, "-c", STOCK, *names], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_same_logits_bit_for_bit(family, reloaded, case):
    equal, dtype, model_type = reloaded[f"{family}-{case}"]
    assert equal
    assert dtype == str(CASES[case][3])
    record = families.FAMILIES[family]
    divides = case in ("heads_divide_the_width", "heads_all_stay", "blocks", "heads_after_blocks")
    assert model_type == (family if divides or not record.stored_as else record.stored_as)


def test_a_llama_with_a_count_that_does_not_divide_is_stored_as_mistral(tmp_path, tiny, random_importance):
    model = pruned(tiny, random_importance, "llama", "heads_do_not_divide_it")
    names, config = set(model.state_dict()), model.config.to_dict()
    folder = checkpoints.save(model, None, tmp_path / "stored")
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["model_type"], stored["num_attention_heads"], stored["head_dim"]) == ("mistral", 5, 8)
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == (10000.0 if OLD else config[
        "rope_parameters"]["rope_theta"])
    assert stored["sliding_window"] is None
    assert stored["bos_token_id"] == 1
    assert model.config.model_type == "llama" and set(model.state_dict()) == names  # the model in memory is unchanged


def test_a_llama_keeps_its_scaled_positions_when_stored_as_mistral(tmp_path, tiny, random_importance):
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}
    old = {"rope_theta": scaled["rope_theta"], "rope_scaling": {k: v for k, v in scaled.items() if k != "rope_theta"}}
    model = tiny("llama", heads=6, groups=6, neurons=60, fields=old if OLD else {"rope_parameters": scaled})
    plan = choose(random_importance(model), model, removed_fraction=0.2, heads_removed=1)
    folder = checkpoints.save(surgery.remove(model, plan), None, tmp_path / "stored")  # verified by reloading
    stored = json.loads((folder / "config.json").read_text())
    assert stored["rope_parameters"] == scaled and {k: stored[k] for k in old} == old


def test_a_head_width_the_config_does_not_state_is_written_down(family, tmp_path):
    """Without ``head_dim``, loading would recompute it as width / heads: 48 / 4 = 12 instead of 8 (Qwen3: 128)."""
    fields = families.tiny(family, width=48, heads=6, groups=3, head_width=8, vocabulary=128).to_dict()
    del fields["head_dim"]
    model = build(AutoConfig.for_model(**fields))
    plan = Plan("whole_groups", torch.tensor([[0], [2]]), torch.zeros(2, 0, dtype=torch.long), families.sizes(model))
    folder = checkpoints.save(surgery.remove(model, plan), None, tmp_path / "stored")  # verified by reloading
    assert json.loads((folder / "config.json").read_text())["head_dim"] == families.head_width(model)


def test_the_folder_holds_safetensors_the_tokenizer_and_nothing_pickled(tmp_path, tiny, tokenizer):
    folder = checkpoints.save(tiny("qwen3"), tokenizer, tmp_path / "deep" / "stored")
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert [p.name for p in folder.parent.iterdir()] == ["stored"]


def test_an_empty_folder_is_filled_and_one_that_holds_something_is_left_alone(tmp_path, tiny):
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir(), empty.mkdir(), (full / "thesis.txt").write_text("mine"), file.write_text("mine")
    for taken in (full, file):
        with pytest.raises(FileExistsError, match=f"{taken.name} exists and is not empty"):
            checkpoints.save(tiny("llama"), None, taken)
    assert [p.name for p in full.iterdir()] == ["thesis.txt"] and file.read_text() == "mine"
    checkpoints.save(tiny("llama"), None, empty)
    assert (empty / "model.safetensors").exists()


def test_another_account_may_read_a_checkpoint_as_it_may_read_other_new_files(tmp_path, tiny, tokenizer):
    """A server or a container seldom runs as the one who pruned; safetensors alone would make files for the owner."""
    before = os.umask(0o027)
    try:
        places = [checkpoints.save(tiny("llama"), tokenizer, tmp_path / "text"),
                  checkpoints.save(image_network("cifar_resnet", depth=8), None, tmp_path / "image")]
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for place in places for file in place.iterdir()} == {"0o640"}
    assert {oct(place.stat().st_mode & 0o777) for place in places} == {"0o750"}


@pytest.mark.parametrize("existed", [True, False])
def test_a_checkpoint_that_would_load_as_another_network_is_refused_and_nothing_is_left(tmp_path, tiny, existed):
    model = tiny("mistral")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + 1e-3)  # is not stored
    if existed:
        (tmp_path / "stored").mkdir()
    with pytest.raises(RuntimeError, match="differs.*0.001"):
        checkpoints.save(model, None, tmp_path / "stored")
    assert [p.name for p in tmp_path.rglob("*")] == ["stored"] * existed


def test_an_unequal_cut_made_by_hand_does_not_reach_the_disk(tmp_path, tiny):
    """Save sizes that the config does not state: transformers refuses the weights, and nothing is left behind."""
    model = tiny("qwen2")
    mlp = model.model.layers[0].mlp
    mlp.down_proj, mlp.up_proj, mlp.gate_proj = (torch.nn.Linear(a, b, bias=False)
                                                 for a, b in ((20, 48), (48, 20), (48, 20)))
    with pytest.raises((RuntimeError, ValueError)):
        checkpoints.save(model, None, tmp_path / "stored")
    assert not list(tmp_path.iterdir())


def test_a_llama_with_biases_and_a_count_that_does_not_divide_is_not_written(tmp_path, tiny):
    """Refuse to save such a model from another source; surgery refuses to make one."""
    model = tiny("llama", heads=6, groups=6)
    plan = Plan("whole_groups", torch.tensor([[0], [1]]), torch.zeros(2, 0, dtype=torch.long), families.sizes(model))
    odd = surgery.remove(model, plan)
    odd.config.attention_bias = True
    with pytest.raises(ValueError, match="5 heads.*attention_bias.*Allowed"):
        checkpoints.save(odd, None, tmp_path / "stored")
    assert not list(tmp_path.iterdir())


def test_saving_leaves_every_module_in_the_mode_it_was_in(tmp_path, tiny):
    for model in (tiny("llama").train(), image_network("cifar_resnet", depth=8).train()):
        next(model.children()).eval()  # as one that is not to learn
        modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
        checkpoints.save(model, None, tmp_path / type(model).__name__)
        assert [m.training for m in model.modules()] == modes and set(modes) == {True, False}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("existed", [True, False])
def test_an_image_network_is_stored_and_loaded_cut_stored_and_loaded(tmp_path, existed):
    network = image_network("cifar_resnet", depth=20, shortcut="projection")
    for step, name in enumerate(("layer1.1", "layer1.1", "layer3.2")):
        network = surgery.remove(network, BlockPlan.of(network, [name]))
        if existed:
            (tmp_path / str(step)).mkdir()
        folder = checkpoints.save(network, None, tmp_path / str(step))
        again, tokenizer = loading.load_model(str(folder))
        with torch.no_grad():
            assert torch.equal(network(pixels()), again(pixels()))
        assert tokenizer is None and again.config == network.config
        network = again
    assert network.config.kept_blocks == ("layer1.0", "layer2.0", "layer2.1", "layer2.2", "layer3.0", "layer3.1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]
    with pytest.raises(FileExistsError, match="not empty"):
        checkpoints.save(network, None, tmp_path / "0")


def test_an_image_network_that_a_folder_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    changed = image_network("cifar_resnet", depth=8)
    changed.normalise.mean += 0.1  # is not stored: the config has the mean
    with pytest.raises(RuntimeError, match="differs"):
        checkpoints.save(changed, None, tmp_path / "stored")
    other = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 2], 3)
    with pytest.raises(ValueError, match="nothing tells how to build this ResNet again.*describe"):
        checkpoints.save(other, None, tmp_path / "stored")
    assert not list(tmp_path.iterdir())


def test_the_order_of_pixels_in_memory_does_not_matter(tmp_path):
    network = image_network("cifar_resnet", depth=20).to(memory_format=torch.channels_last)
    checkpoints.save(network, None, tmp_path / "stored")


# --- killed, and on a full disk ---------------------------------------------------------------------------------------


class Stops:
    """A tokenizer that stops the save after all weights are written."""

    def save_pretrained(self, folder):
        time.sleep(60)


def saved_by_another(model, tokenizer, folder):
    """Start a process and return it in the middle of its save."""
    process = multiprocessing.get_context("fork").Process(target=checkpoints.save, args=(model, tokenizer, folder))
    process.start()
    end = time.monotonic() + 30
    while not list(folder.parent.glob(".*/model*.safetensors")):
        assert time.monotonic() < end and process.is_alive(), "waited in vain"
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("all_written", [True, False])
def test_killed_in_the_middle_nothing_is_seen_and_the_next_one_clears_up(tmp_path, tiny, monkeypatch, all_written):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 2000)  # tens of shards
    model, folder = tiny("qwen2"), tmp_path / "smaller[1]"  # a name with special characters of a shell
    process = saved_by_another(model, Stops() if all_written else None, folder)
    process.kill()
    process.join()
    left, = tmp_path.iterdir()
    assert not folder.exists() and left.name.startswith(".smaller[1]-") and left.name.endswith(".part")
    (mine := tmp_path / ".smaller[1]-mine").mkdir()
    checkpoints.save(model, None, folder)
    assert sorted(tmp_path.iterdir()) == [mine, folder]


def test_one_that_is_still_being_written_is_left_alone(tmp_path, tiny):
    process = saved_by_another(tiny("qwen2"), Stops(), tmp_path / "smaller")
    checkpoints.save(tiny("qwen3"), None, tmp_path / "smaller")
    assert process.is_alive() and len(list(tmp_path.glob(".smaller-*/model.safetensors"))) == 1
    process.kill()
    process.join()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000])
def test_on_a_full_disk_the_error_says_what_it_takes_and_nothing_is_left(small_disk, tiny, monkeypatch, shard_bytes):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", shard_bytes)
    (small_disk / "mine.txt").write_text("mine")
    network = image_network("cifar_resnet", depth=56)  # 3.4 MB
    for model in (tiny("llama", width=96, heads=6, neurons=900, vocabulary=1280), network):
        with pytest.raises(OSError, match="No space left on device.*Nothing was written; it needs 0.0 GB"):
            checkpoints.save(model, None, small_disk / "smaller")
        assert [path.name for path in small_disk.iterdir()] == ["mine.txt"]


def test_saving_says_nothing_about_weights_that_wait_where_they_should(tmp_path, tiny, caplog):
    with caplog.at_level(logging.WARNING):
        checkpoints.save(tiny("llama"), None, tmp_path / "stored")
    assert not caplog.records


NEWER = ["emu3", "laguna"]  # transformers 4.56 does not know the second, and cannot build the first by its text part


@pytest.mark.parametrize("name", ["bart", "recurrent_gemma", "xlstm", "zamba2", "got_ocr2", "jetmoe",
                                  *NEWER * (not OLD)])
def test_models_with_caches_towers_and_weights_of_their_own_kind_are_saved_and_verified(name, tmp_path):
    model = toy(name)
    checkpoints.save(model, None, tmp_path / "saved")
    assert list((tmp_path / "saved").glob("*.safetensors"))
    with torch.no_grad():  # the verification sees a change of the weights
        model.get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="differs from the model"):
        checkpoints._compare(model, tmp_path / "saved")
