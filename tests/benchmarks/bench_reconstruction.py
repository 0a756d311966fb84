"""Time and memory of reconstruction on SmolLM2, with a lower bound: 20 % removed, neurons only, float32.

floor       one plain forward pass of the same text without the language-model head, nothing collected
one_pass, sequential, asymmetric    the modes of ``reconstruct.remove``, at one ridge

Times are medians of interleaved repetitions; memory is the rise of the peak of a separate process, including the
pruned copy of the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

import torch
from bench_importance import floor, peak_bytes, peak_elsewhere

from pruning_lib import data
from pruning_lib.models import loading
from pruning_lib.pruning import amp, reconstruction, selection

TEXTS = 4


def resolved(mode, model, batches):
    scores = amp.importance(model, batches[:1], progress=False)
    plan = selection.choose(scores, model, removed_fraction=0.2, heads_removed=0)
    return reconstruction.reconstruct(model, plan, batches, mode=mode, progress=False)[1]


WAYS = {"floor": floor, **{mode: partial(resolved, mode) for mode in reconstruction.MODES}}


def setting():
    model, tokenizer = loading.load_model("smollm2-135m-instruct")
    return model, data.batches(data.texts("mini_calibration_text", TEXTS), tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peak", metavar="WAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, batches = setting()
    if arguments.peak:
        print(json.dumps(peak_bytes(WAYS[arguments.peak], model, batches)))
        return
    seconds = {way: [] for way in WAYS}
    floor(model, batches)  # warm-up
    for _ in range(arguments.repetitions):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(model, batches)
            seconds[name].append(time.perf_counter() - start)
    median = {way: statistics.median(s) for way, s in seconds.items()}
    print(f"{'':12}{'median s':>10}{'fastest':>10}{'slowest':>10}{'x floor':>9}{'peak MB':>9}")
    for way in WAYS:
        print(f"{way:12}{median[way]:10.2f}{min(seconds[way]):10.2f}{max(seconds[way]):10.2f}"
              f"{median[way] / median['floor']:9.1f}{peak_elsewhere(__file__, way):>9}")
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    print(f"{TEXTS} texts, {tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
