"""An offloaded model is scored, pruned and saved, with the same results as in memory."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from safetensors.torch import save_file
from test_amp import padded
from transformers import AutoModelForCausalLM

from pruning_lib.models import checkpoints, families, offload, published_configs, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.pruning import amp, selection

WAITS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
         "model.norm": "cpu", "model.final_layernorm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


@pytest.fixture
def pair(family, tiny, tmp_path, tokenizer):
    """Return (model in memory, the same model with two of three blocks on disk)."""
    model = tiny(family, n_blocks=3, heads=6, groups=6)
    model.save_pretrained(tmp_path / "whole", max_shard_size=30_000)
    names = dict(model.named_modules())
    where = {name: place for name, place in WAITS.items() if name in names}
    if model.config.tie_word_embeddings:  # a weight can be offloaded once only
        where["lm_head"] = where["model.embed_tokens"]
    waiting = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32, device_map=where)
    assert offload.is_offloaded(waiting) and not offload.is_offloaded(model)
    return model, waiting


def test_scores_cut_and_checkpoint_are_those_of_the_model_in_memory_bit_for_bit(pair, prompts, tmp_path):
    model, waiting = pair
    scores, same = (amp.importance(m, [padded(prompts)], progress=False) for m in pair)
    assert torch.equal(scores.heads, same.heads) and torch.equal(scores.neurons, same.neurons)
    plan = selection.choose(scores, model, removed_fraction=0.15, heads_removed=1)
    smaller, cut = surgery.remove(model, plan), surgery.remove(waiting, plan, inplace=True)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        wanted = smaller(ids).logits
        assert torch.equal(cut(ids).logits, wanted)
        assert families.sizes(cut) == families.sizes(smaller)
        checkpoints.save(cut, None, tmp_path / "smaller")  # 5 heads of width 8 in 48: a LLaMA is stored as a Mistral
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
        assert torch.equal(stored(ids).logits, wanted)
        checkpoints.save(smaller, None, tmp_path / "of_memory")
        assert type(stored) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "of_memory"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("smaller", "of_memory")]
    assert configs[0] == configs[1]


def test_blocks_that_wait_can_go(pair, prompts):
    model, waiting = pair
    plan = BlockPlan.of(model, ["model.layers.1"])
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        wanted = surgery.remove(model, plan)(ids).logits
        assert torch.equal(surgery.remove(waiting, plan, inplace=True)(ids).logits, wanted)


def test_a_copy_of_what_waits_is_refused_with_the_way_out(pair, random_importance):
    plan = selection.choose(random_importance(pair[0]), pair[0], removed_fraction=0.15, heads_removed=1)
    with pytest.raises(ValueError, match="offloaded to disk .*give inplace=True"):
        surgery.remove(pair[1], plan)


def test_a_checkpoint_that_is_proven_is_brought_layer_by_layer_to_where_the_model_is(family, tiny, tmp_path):
    """Run on the meta device, the second device of every machine."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    stored = offload.load_from_disk(tmp_path, torch.device("cpu"), dtype=torch.float32)
    there, ran = [], []  # bytes of loaded weights, and devices, each time a layer runs
    for module in stored.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_: there.append(sum(
                p.numel() * 4 for p in stored.parameters() if p.device.type != "meta")))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(stored(ids).logits, model(ids).logits)
        elsewhere = offload.load_from_disk(tmp_path, torch.device("meta"), dtype=torch.float32)
        block = families.blocks(elsewhere)[1]
        block.register_forward_hook(lambda module, args, out: ran.append(out.device.type))
        elsewhere(ids.to("meta"))
    largest = max(p.numel() * 4 for p in model.parameters())
    assert there and max(there) <= largest and ran == ["meta"]
    assert {buffer.device.type for buffer in elsewhere.buffers()} == {"meta"}


# --- parts of a pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_merged_in_any_order_are_the_one_pass_bit_for_bit(family, tiny, dtype):
    model = tiny(family, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 17, 9, 4, 12, 30, 1, 8)
    batches = [padded([torch.randint(3, 128, (n,), generator=generator).tolist()]) for n in lengths]
    whole = amp.importance(model, iter(batches), progress=False)
    parts = [amp.score_sums(model, batches[i::3], progress=False) for i in range(3)]
    for order in (parts, parts[::-1]):
        merged = amp.merge(order)
        assert torch.equal(merged.heads, whole.heads) and torch.equal(merged.neurons, whole.neurons)
        assert merged.made_with == whole.made_with
    assert sum(part.prompts for part in parts) == len(lengths)
    assert not torch.equal(amp.merge(parts[:2]).neurons, whole.neurons)


def test_parts_of_other_models_and_no_parts_are_refused(tiny, prompts):
    one, other = (amp.score_sums(tiny("llama", neurons=n), [padded(prompts)], progress=False) for n in (24, 32))
    with pytest.raises(ValueError, match="different sizes or dtypes"):
        amp.merge([one, other])
    for none in ([], [amp.score_sums(tiny("llama"), [], progress=False)]):
        with pytest.raises(ValueError, match="no batches"):
            amp.merge(none)


# --- larger than the memory -------------------------------------------------------------------------------------------

SIZES = {"width": 512, "heads": 8, "groups": 8, "head_width": 64, "neurons": 1408, "n_blocks": 24, "vocabulary": 2048}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return a folder with a random LLaMA of 320 MB in 24 shards, one block each, and its size in MB."""
    folder = tmp_path_factory.mktemp("large") / "dense"
    folder.mkdir()
    config = families.tiny("llama", **SIZES)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shard_of = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
                for name in shapes}
    generator = torch.Generator().manual_seed(0)
    for shard in set(shard_of.values()):
        save_file({name: torch.randn(shape, generator=generator) / 30 for name, shape in shapes.items()
                   if shard_of[name] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    config.save_pretrained(folder)
    return folder, sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


PRUNES = """
import json, os, sys, threading, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from pruning_lib.models import checkpoints, families, surgery
from pruning_lib.pruning import amp, selection
torch.set_num_threads(1)
folder, way = sys.argv[1], None
for one in sys.argv[2:]:  # a process each, forked behind the imports, which take longer than the work
    way = one if os.fork() == 0 else None
    if way:
        break
    assert os.wait()[1] == 0
if way is None:
    sys.exit()
out = str(Path(folder).parent / way)

def prune(model, out, removed_fraction):
    ids = torch.randint(3, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scores = amp.importance(model, [batch], progress=False)
    plan = selection.choose(scores, model, removed_fraction=removed_fraction, heads_removed=1)
    checkpoints.save(surgery.remove(model, plan, inplace=True), None, out)
    return scores

def now(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1e3

def watch():
    while True:
        most[0] = max(most[0], now("RssAnon"))
        time.sleep(0.005)

config = families.tiny("llama", width=48, heads=6, groups=6, vocabulary=2048)
prune(AutoModelForCausalLM.from_config(config), out + "-warm", 0.03)  # what libraries take for themselves
own, before, most = now("RssAnon"), now("VmRSS"), [0]
threading.Thread(target=watch, daemon=True).start()
place = {"device_map": "auto", "max_memory": {"cpu": "60MB"}} if way == "waiting" else {}
checkpoints.SHARD_BYTES = 30_000_000
scores = prune(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place), out, 0.2)
total = scores.heads.double().sum().item()
grown = {"all_mb": now("VmHWM") - before, "own_mb": most[0] - own, "heads": total}
Path(out + ".json").write_text(json.dumps(grown))
"""


def prunes(folder, *ways):
    """Return the growth in memory of a separate process each in MB: in total, and without the page cache of files."""
    done = subprocess.run([sys.executable, "-c", PRUNES, str(folder), *ways], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder.parent / f"{way}.json").read_text()) for way in ways]


def test_a_checkpoint_larger_than_the_memory_is_pruned_and_saved(large):
    """Compare with a limit of 0.6 of the model's size; in memory the same run needs more, but less than 1.3 of it."""
    folder, size = large
    whole, waiting = prunes(folder, "in memory", "waiting")
    out = folder.parent
    assert waiting["all_mb"] < 0.6 * size < whole["own_mb"] < 1.3 * size, (size, waiting, whole)
    assert waiting["heads"] == whole["heads"]
    for path in (out / "waiting").glob("*.safetensors"):
        assert path.stat().st_size < 0.15 * size * 1e6
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(out / way)(ids).logits for way in ("in memory", "waiting")]
    assert torch.equal(*logits)


def fullest(network, memory):
    """Return (GB on the fullest device, GB offloaded) for accelerate's distribution of the blocks."""
    names = [part for part in network._no_split_modules]
    room = get_balanced_memory(network, memory, no_split_module_classes=names, dtype=torch.bfloat16)
    places = infer_auto_device_map(network, room, no_split_module_classes=names, dtype=torch.bfloat16)
    taken = Counter()
    for name, parameter in network.named_parameters():
        where = next(place for part, place in places.items() if f"{name}.".startswith(f"{part}."))
        taken[where] += 2 * parameter.numel() / 1e9
    waits = taken.pop("cpu", 0) + taken.pop("disk", 0)
    return max(taken.values()), waits


def test_the_memory_worked_out_in_the_book_is_that_of_the_model():
    network = published_configs.random_model("meta-llama/Llama-3.1-70B")
    s = families.sizes(network)
    text = (Path(families.__file__).parents[2] / "book" / "chapters" / "scale.md").read_text()
    size, T, largest = 2 * s.parameters, 1024, max(2 * p.numel() for p in network.parameters())
    (two, none), (eight, no_more), (_, some) = (fullest(network, {**dict.fromkeys(range(n), room), "cpu": "100GB"})
                                                for n, room in ((2, "75GB"), (8, "22GB"), (2, "70GB")))
    assert none == no_more == 0 and 'memory={0: "75GB", 1: "75GB", "cpu": "100GB"}' in text
    for figure in (f"{s.parameters / 1e9:.1f} billion parameters, {size / 1e9:.0f} GB",
                   f"of two, of 75 GB each | {two:.1f} GB", f"of eight, of 22 GB each | {eight:.1f} GB",
                   f"with 70 GB per GPU, {some:.1f} GB would have to be in host memory",
                   f"1024 x 28672 | {2 * T * s.neurons / 1e6:.0f} MB", f"1024 x 8192 | {2 * T * s.width / 1e6:.0f} MB",
                   f"float64 | {8 * s.blocks * (s.heads + s.neurons) / 1e6:.0f} MB",
                   f"while the checkpoint is compared | {largest / 1e9:.1f} GB"):
        assert figure in text, figure
