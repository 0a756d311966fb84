"""Speed of AMP's importance pass on SmolLM2, with two references.

ours       the library: one pass, padded batches of similar length, no language-model head, one head's share at a
           time
published  the published procedure, reimplemented: one prompt at a time, a pass for heads, a pass for neurons, the
           logits computed, the whole tokens x heads x width tensor
floor      one plain forward pass of the same batches without the language-model head, nothing scored

Times are medians of interleaved repetitions; memory is the rise of the peak of a separate process.  ``--memory``
spreads the model as ``load_model(memory=...)`` does, for example ``'{"cpu": "150MB"}'`` with the rest on disk or
``'{"0": "150MB", "cpu": "2GB"}'`` with a GPU.  Ours and the floor then read and transfer the same weights, which
counts in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from pruning_lib import data
from pruning_lib.models import families, loading
from pruning_lib.models.hooks import inputs_to
from pruning_lib.pruning import amp

LENGTHS = range(81, 121, 2)  # tokens of the 20 prompts, 100 on average


def published(model, batches):
    """Compute scores as the published code does: correct, and slow."""
    family, s = families.family_of(model), families.sizes(model)
    prompts = [b["input_ids"][i:i + 1, :int(mask.sum())] for b in batches for i, mask in enumerate(b["attention_mask"])]
    heads, neurons = torch.zeros(s.blocks, s.heads), torch.zeros(s.blocks, s.neurons)
    out = [b.get_submodule(family.heads_out) for b in families.blocks(model)]
    down = [b.get_submodule(family.neurons_out) for b in families.blocks(model)]

    def see_heads(i, x):
        x = x[0].view(-1, s.heads, s.head_width)  # (T, H, D)
        w = out[i].weight.view(-1, s.heads, s.head_width)  # (C, H, D)
        heads[i] += torch.einsum("thd,chd->thc", x, w).abs().sum(-1, dtype=torch.float32).mean(0)

    def see_neurons(i, x):
        neurons[i] += x[0].abs().mean(0, dtype=torch.float32)

    for modules, see in ((out, see_heads), (down, see_neurons)):
        with torch.inference_mode(), inputs_to(modules, see):
            for ids in prompts:
                model(ids)
    return heads / len(prompts), neurons / len(prompts)


def ours(model, batches):
    found = amp.importance(model, batches, progress=False)
    return found.heads, found.neurons


def floor(model, batches):
    with torch.inference_mode():
        for batch in batches:
            model.base_model(**batch, use_cache=False)


WAYS = {"published": published, "ours": ours, "floor": floor}


def setting(dtype, memory=None):
    model, tokenizer = loading.load_model("smollm2-135m-instruct", dtype=dtype, memory=memory,
                                          device="auto" if memory else None)
    ids = [tokenizer(text)["input_ids"][:n] for text, n in zip(data.texts("mini_text"), LENGTHS, strict=False)]
    return model, data.batches([tokenizer.decode(i) for i in ids], tokenizer)


def peak_bytes(way, model, batches):
    """Return the rise of resident memory by ``way`` in this process; None where the system does not report it."""
    def high_water():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    try:
        floor(model, [{k: v[:1, :8] for k, v in batches[0].items()}])  # the set-up of the first call does not count
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = high_water()
    except OSError:
        return None
    way(model, batches)
    return high_water() - before


def peak_elsewhere(script, *arguments):
    """Return the output of ``script --peak`` as a column of text; a separate process avoids carry-over."""
    command = [sys.executable, script, "--peak", *arguments]
    peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return "?" if peak is None else f"{peak / 1e6:.0f}"


def waiting(memory, repetitions):
    """Print the times of ours and the floor for a model whose weights wait on disk or in host memory."""
    model, batches = setting("float32", memory)
    places = Counter(str(place) for place in getattr(model, "hf_device_map", {}).values())
    seconds = timed({name: WAYS[name] for name in ("ours", "floor")}, model, batches, repetitions)
    mine, least = (statistics.median(found) for found in seconds.values())
    print(f"parts of the model by place: {dict(places)}; ours {mine:.2f} s, floor {least:.2f} s, "
          f"ratio {mine / least:.2f}")


def timed(ways, model, batches, repetitions):
    """Return the seconds of every repetition of every way, taken in turn after a first call."""
    seconds = {name: [] for name in ways}
    for way in ways.values():
        way(model, batches)  # warm-up
    for _ in range(repetitions):
        for name, way in ways.items():
            start = time.perf_counter()
            way(model, batches)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a GPU works on after the call has returned
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measured(dtype, repetitions):
    model, batches = setting(dtype)
    seconds = timed(WAYS, model, batches, repetitions)
    for a, b in zip(published(model, batches), ours(model, batches), strict=True):
        torch.testing.assert_close(a, b, rtol={"float32": 1e-4, "bfloat16": 5e-2}[dtype], atol=0)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    return tokens, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=json.loads, help="device -> size, the rest of the model waits")
    arguments = parser.parse_args()
    if arguments.memory:
        places = {int(place) if place.isdigit() else place: size for place, size in arguments.memory.items()}
        return waiting(places, arguments.repetitions)
    if arguments.peak:
        way, dtype = arguments.peak
        print(json.dumps(peak_bytes(WAYS[way], *setting(dtype))))
        return
    print(f"{'dtype':21}{'median s':>10}{'fastest':>10}{'slowest':>10}{'x published':>13}{'x floor':>9}{'peak MB':>9}")
    for dtype in ("float32", "bfloat16"):
        tokens, seconds = measured(dtype, arguments.repetitions)
        median = {way: statistics.median(s) for way, s in seconds.items()}
        for way in WAYS:
            print(f"{dtype:10}{way:11}{median[way]:10.2f}{min(seconds[way]):10.2f}{max(seconds[way]):10.2f}"
                  f"{median['published'] / median[way]:13.2f}{median[way] / median['floor']:9.2f}"
                  f"{peak_elsewhere(__file__, way, dtype):>9}")
    print(f"{len(LENGTHS)} prompts, {tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
