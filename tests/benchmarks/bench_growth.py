"""Growth of time and memory of pruning toy LLaMAs with tokens, blocks, prompts, parameters and workers.

Each point is the median of five passes of importance after a warm-up: CPU seconds (nearly independent of other load)
and the largest rise of resident memory.  ``--rows`` adds workers: wall-clock seconds and memory of all processes for
eight rows of three seconds each, at several numbers of parallel rows; this needs an idle machine.  ``--write`` writes
table, curves and text into the book.  The script takes about five minutes with both options.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from pruning_lib.models import families
from pruning_lib.pruning import amp

BASE = {"tokens": 512, "blocks": 4, "prompts": 8, "width": 256}  # large enough for a measurable growth of memory
GROWS = {"tokens": (256, 512, 1024, 2048), "blocks": (4, 8, 16, 32), "prompts": (8, 16, 32, 64),
         "width": (128, 256, 512, 768)}
WORKERS, ROWS, REPEATS = (1, 2, 4, 8), "abcdefgh", 5
DRAWINGS = Path(__file__).parents[2] / "book" / "drawings"


def drawing(name):
    """Import the script of ``book/drawings`` that turns a table of measurements into text and curves."""
    spec = importlib.util.spec_from_file_location(name, DRAWINGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def high_water_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def point(tokens, blocks, prompts, width):
    """Return parameters, CPU seconds and MB of one pass over ``prompts`` batches of one prompt each."""
    config = families.tiny("llama", n_blocks=blocks, width=width, heads=width // 32, groups=width // 32, head_width=32,
                           neurons=3 * width, vocabulary=256)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    amp.score_sums(model, [{k: v[:, :8] for k, v in batch.items()}], progress=False)
    seconds, memory = zip(*(one_pass(model, batch, prompts) for _ in range(REPEATS)), strict=True)
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds": round(statistics.median(seconds), 3),
            "memory_mb": round(statistics.median(memory), 1)}


def one_pass(model, batch, prompts):
    """Return (CPU seconds, rise of memory in MB)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed before would count as the initial level
    Path("/proc/self/clear_refs").write_text("5")
    before, start = high_water_mb(), time.process_time()
    amp.score_sums(model, (batch for _ in range(prompts)), progress=False)
    return time.process_time() - start, high_water_mb() - before


def rows_at_a_time(jobs):
    """Return wall-clock seconds and peak memory of eight rows that compute for three seconds each."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import trees

    from pruning_lib.experiments import local, runs

    with tempfile.TemporaryDirectory() as folder:
        tree = trees.make(Path(folder), {name: {"act": "compute"} for name in ROWS})
        chosen = [row for row in runs.rows(tree).values() if not row.reading]
        most, done = [0.0], threading.Event()
        watch = threading.Thread(target=sample, args=(most, done))
        watch.start()
        start = time.monotonic()
        failed = local.run(chosen, tree, local.Machine(jobs, 1, 1000), log=lambda text: None)
        seconds = time.monotonic() - start
        done.set()
        watch.join()
        assert not failed
        return {"parameters": "", "seconds": round(seconds, 1), "memory_mb": round(most[0])}


def sample(most, done):
    """Store the peak memory in MB of all row processes in ``most``, counted as in ``local``."""
    while not done.wait(0.2):
        total = 0
        for process in psutil.Process().children(recursive=True):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # the process ended meanwhile
                pass
        most[0] = max(most[0], total / 1e6)


def conditions():
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.machine())
    return f"{name}, one thread, torch {torch.__version__}, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="table, curves and words into the book")
    parser.add_argument("--rows", action="store_true", help="also workers, by the clock")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured_on = conditions()  # load of other processes
    lines = [["what grows", "to", "parameters", "seconds", "memory, MB"]]
    for kind, numbers in {**GROWS, **({"workers": WORKERS} if arguments.rows else {})}.items():
        for number in numbers:
            found = point(**{**BASE, kind: number}) if kind in BASE else rows_at_a_time(number)
            lines.append([kind, number, found["parameters"], found["seconds"], found["memory_mb"]])
            print("{:16}{:>6}{:>12}{:>10}{:>10}".format(*map(str, lines[-1])), flush=True)
    lines.append([f"measured on {measured_on}", "", "", "", ""])
    print(lines[-1][0])
    if arguments.write:
        growth = drawing("growth")
        with growth.TABLE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        growth.write()


if __name__ == "__main__":
    main()
