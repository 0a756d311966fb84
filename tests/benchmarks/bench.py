"""Speed of the longest computations in one table, beside a plain way and the limit of this machine's arithmetic.

importance       AMP on SmolLM2; plain: the published procedure (``bench_importance``)
reconstruction   sequential, four blocks of SmolLM2's shape with random weights; plain: one pass over the same tokens
consensus        all blocks of a ResNet-20, eight metrics; plain: a pass per block and metric, scaled from one block
perplexity       SmolLM2, windows of 512 tokens; plain: transformers' own logits and loss of every window
tasks            ``mini_arc_easy`` on SmolLM2; plain: lm-eval's own model class
perplexity-bf16  perplexity in bfloat16, as checkpoints in it are measured; plain: the same in float32

Times are processor seconds of one thread, which other work on the machine changes little; the ways take turns, and the
median counts.  The floor is the number of multiply-adds of the passes (and of half a Gram matrix per projection)
divided by the machine's measured peak for products of matrices.  Memory is the rise of the peak during the library's
way.  ``--write`` writes table, curves and text into the book.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import bench_consensus
import bench_growth
import bench_importance
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import pruning_lib as pl
from pruning_lib.evaluation import quality
from pruning_lib.models import families, image_networks, loading
from pruning_lib.pruning import amp, consensus, reconstruction, selection, similarity

SIZES = {"importance": (2, 4, 8), "reconstruction": (512, 1024, 2048, 4096), "consensus": (8, 16, 32),
         "perplexity": (256, 512, 1024), "tasks": (4, 8, 16), "perplexity-bf16": (256, 512, 1024)}
UNITS = {"importance": "prompts of 100 tokens", "reconstruction": "tokens", "consensus": "images per class",
         "perplexity": "tokens", "tasks": "questions",
         "perplexity-bf16": "tokens"}


def peak(dtype):
    """Return multiply-adds per second of products of matrices, the best of five."""
    a = torch.randn(1536, 1536).to(dtype)
    return 1536**3 / min(seconds(lambda: a @ a) for _ in range(5))


def copied():
    """Return bytes per second of a copy, the best of five."""
    a, b = torch.ones(2, 32_000_000)
    return 2 * 4 * len(a) / min(seconds(lambda: a.copy_(b)) for _ in range(5))


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def multiply_adds(work):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def rise_mb(work):
    """Return the rise of the process's peak memory during ``work``, in MB."""
    def level(kind):
        return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1e3

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed before would count as the initial level
    Path("/proc/self/clear_refs").write_text("5")
    before = level("VmRSS")
    work()
    return level("VmHWM") - before


# --- computations: each returns the library's way, the plain way, the factor of its time, and multiply-adds -----------


def importance(prompts):
    model, tokenizer = loading.load_model("smollm2-135m-instruct", dtype="float32")
    ids = torch.randint(3, 500, (prompts, 100), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    one = [{name: tensor[:1] for name, tensor in batches[0].items()}]
    return (lambda: amp.importance(model, batches, progress=False), lambda: bench_importance.published(model, batches),
            1, multiply_adds(lambda: bench_importance.floor(model, one)) * prompts)


def four_blocks():
    config = families.tiny("llama", n_blocks=4, width=576, heads=9, groups=3, head_width=64, neurons=1536,
                           vocabulary=512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def reconstructed(tokens):
    model, generator = four_blocks(), torch.Generator().manual_seed(0)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}
               for ids in torch.randint(3, 500, (tokens // 256, 1, 256), generator=generator)]
    plan = selection.choose(amp.importance(model, batches[:1], progress=False), model, removed_fraction=0.2,
                            heads_removed=0)
    one = multiply_adds(lambda: bench_importance.floor(model, batches[:1])) * len(batches)
    return (lambda: reconstruction.reconstruct(model, plan, batches, progress=False),
            lambda: bench_importance.floor(model, batches), 1, one + 4 * tokens * 1536**2 / 2)


def consensus_scored(per_class):
    network = image_networks.build(image_networks.ImageConfig("cifar_resnet", {"depth": 20}), seed=0).eval()
    pixels = torch.rand(10 * per_class, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10 * per_class) % 10
    names = [block.name for block in families.residual_blocks(network) if block.removable]

    def ours():
        whole, without = consensus.representations(network, pixels, progress=False)
        similarity.distances(whole, without, labels)

    few = multiply_adds(lambda: consensus.representations(network, pixels[:2], progress=False))
    middle = names[len(names) // 2:][:1]
    return (ours, lambda: bench_consensus.plain(network, pixels, labels, middle), len(names), few * len(pixels) / 2)


def perplexity(tokens):
    model, tokenizer = loading.load_model("smollm2-135m-instruct", dtype="float32")
    texts = pl.texts("mini_text")
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", add_special_tokens=False)["input_ids"][:, :tokens]

    def plain():
        with torch.inference_mode():
            for window in ids.split(512, 1):
                model(window, labels=window)

    counted = multiply_adds(lambda: model(ids[:, :256])) * tokens / 256
    return (lambda: quality.perplexity(model, tokenizer, texts, window=min(512, tokens), max_tokens=tokens,
                                       progress=False), plain, 1, counted)


def tasks(questions):
    model, tokenizer = loading.load_model("smollm2-135m-instruct", dtype="float32")

    def score(stock):
        quality.zero_shot(model, tokenizer, "mini_arc_easy", limits={"mini_arc_easy": questions}, stock=stock)

    return lambda: score(False), lambda: score(True), 1, multiply_adds(lambda: score(False))


def perplexity_bf16(tokens):
    whole, _, factor, counted = perplexity(tokens)
    model, tokenizer = loading.load_model("smollm2-135m-instruct", dtype="bfloat16")
    return (lambda: quality.perplexity(model, tokenizer, pl.texts("mini_text"), window=min(512, tokens),
                                       max_tokens=tokens, progress=False),
            whole, factor, counted * peak(torch.float32) / peak(torch.bfloat16))


WORK = {"importance": importance, "reconstruction": reconstructed, "consensus": consensus_scored,
        "perplexity": perplexity, "tasks": tasks, "perplexity-bf16": perplexity_bf16}


def measured(what, size, repetitions, per_second):
    """Return one row of the table."""
    ours, plain, factor, arithmetic = WORK[what](size)
    memory, times = rise_mb(ours), ([], [])  # the first call warms up
    for _ in range(repetitions):
        for found, way in zip(times, (ours, plain), strict=True):
            found.append(seconds(way))
    mine, theirs = statistics.median(times[0]), factor * statistics.median(times[1])
    floor = round(arithmetic / per_second, 3)
    return [what, size, UNITS[what], round(mine, 3), round(theirs, 3), floor, round(memory, 1)]


def conditions():
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.machine())
    return (f"measured on {name}, one thread, torch {torch.__version__}, load {os.getloadavg()[0]:.0f} on "
            f"{os.cpu_count()} cores; peak {peak(torch.float32) / 1e9:.1f} billion multiply-adds per second in "
            f"float32, {peak(torch.bfloat16) / 1e9:.1f} in bfloat16, {peak(torch.float64) / 1e9:.1f} in float64, "
            f"{copied() / 1e9:.1f} GB/s copied")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=WORK, default=list(WORK))
    parser.add_argument("--write", action="store_true", help="table, curves and words into the book")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    speed, said, per_second = bench_growth.drawing("speed"), conditions(), peak(torch.float32)
    lines = []
    for what in arguments.only:
        for size in SIZES[what]:
            lines.append(measured(what, size, arguments.repetitions, per_second))
            print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    print(speed.words(lines, said))
    if arguments.write:
        with speed.TABLE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([speed.COLUMNS, *lines, [said, *[""] * 6]])
        speed.write()


if __name__ == "__main__":
    main()
