"""How time and memory of pruning grow, on toy LLaMAs: with tokens, blocks, prompts, parameters, and rows at a time.

Each point is one pass of importance after a warm-up: CPU seconds (they hardly depend on who else uses the machine), and
how far the resident memory rose.  With ``--rows`` also rows at a time: seconds by the clock for four rows that compute
nothing, so what the runner itself costs; that wants an idle machine.  ``--write`` puts the table into the book.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pruning_lib import amp, families

BASE = {"tokens": 64, "blocks": 4, "prompts": 8, "width": 128}
GROWS = {"tokens": (64, 128, 256, 512, 1024), "blocks": (4, 8, 16, 32), "prompts": (8, 16, 32, 64),
         "width": (64, 128, 256, 512)}
ROWS = (1, 2, 4)
TABLE = Path(__file__).parents[2] / "book" / "_static" / "growth.csv"


def high_water_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def point(tokens, blocks, prompts, width):
    """Parameters, CPU seconds and MB of one pass over ``prompts`` batches of one prompt each."""
    config = families.tiny("llama", n_blocks=blocks, width=width, heads=width // 32, groups=width // 32, head_width=32,
                           neurons=3 * width, vocabulary=256)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    amp.sums(model, [{k: v[:, :8] for k, v in batch.items()}], progress=False)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = high_water_mb(), time.process_time()
    amp.sums(model, (batch for _ in range(prompts)), progress=False)
    seconds = time.process_time() - start
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds": round(seconds, 3),
            "memory_mb": round(high_water_mb() - before, 1)}


def rows_at_a_time(jobs):
    """Seconds by the clock for four rows that wait two seconds each."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import trees

    from pruning_lib import rows, runner

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree = trees.make(root, {name: {"act": "wait"} for name in "abcd"})
        chosen = [row for row in rows.rows(tree).values() if not row.reading]
        start = time.monotonic()
        failed = runner.run(chosen, tree, runner.Machine(jobs, 1, 1000), say=lambda text: None)
        assert not failed
        return {"parameters": "", "seconds": round(time.monotonic() - start, 1), "memory_mb": ""}


def conditions():
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.machine())
    return f"{name}, one thread, torch {torch.__version__}, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"the table into {TABLE.name} of the book")
    parser.add_argument("--rows", action="store_true", help="also rows at a time, by the clock")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [["what grows", "to", "parameters", "seconds", "memory, MB"]]
    for kind, numbers in {**GROWS, **({"rows at a time": ROWS} if arguments.rows else {})}.items():
        for number in numbers:
            found = point(**{**BASE, kind: number}) if kind in BASE else rows_at_a_time(number)
            lines.append([kind, number, found["parameters"], found["seconds"], found["memory_mb"]])
            print("{:16}{:>6}{:>12}{:>10}{:>10}".format(*map(str, lines[-1])), flush=True)
    lines.append([f"measured on {conditions()}", "", "", "", ""])
    print(lines[-1][0])
    if arguments.write:
        with TABLE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main()
