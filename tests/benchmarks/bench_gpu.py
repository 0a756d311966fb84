"""Speed of LLaMA-2-7B's shape, dense and cut in several ways, on one GPU: under ten minutes, resumable.

as published   steps 7 and 10 of the published code (as many parameters as 7 and 10 blocks, a multiple of eight neurons)
multiple of N  the same fractions, with a number of neurons that suits matrix units
curve          0 to 50 % in steps of 10, one sequence, steps recorded as CUDA graphs

Weights are random: they take as long as trained ones.  Every pair of a cut and a setting is measured in turn with the
dense model, and written to the file at once; a second call measures only what is missing.  `--toy` tries it on any
machine with a small model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pruning_lib._files import replacing
from pruning_lib.evaluation import generation_speed
from pruning_lib.models import families, published_configs, surgery
from pruning_lib.pruning import importance
from pruning_lib.pruning.selection import choose

MODEL = "meta-llama/Llama-2-7b-hf"
STEPS = {"step 7": 7, "step 10": 10}  # of the published code, near 20 % and 30 %


def dense_model(toy):
    if not toy:
        return published_configs.random_model(MODEL, device="cuda")
    config = families.tiny("llama", n_blocks=32, heads=32, groups=32, head_width=4, neurons=344, width=128,
                           vocabulary=512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def in_blocks(sizes):
    """Return the parameters of one block that heads and neurons hold."""
    return (sizes.heads * sizes.head_parameters + sizes.groups * sizes.group_parameters
            + sizes.neurons * sizes.neuron_parameters)


def cuts(model):
    """Return name -> (fraction of all parameters, multiple of the kept neurons)."""
    sizes = families.sizes(model)
    steps = {name: k * in_blocks(sizes) / sizes.parameters for name, k in STEPS.items()}
    found = {f"{name}, as published": (fraction, 8) for name, fraction in steps.items()}
    found |= {f"{name}, multiple of {n}": (fraction, n) for name, fraction in steps.items() for n in (64, 128)}
    return found | {f"curve {percent} %": (percent / 100, 128) for percent in range(10, 60, 10)}


def settings(name, toy):
    """Return the settings of one cut: sequences, tokens of a prompt, whether steps are recorded as graphs."""
    if toy:
        return [(1, 8, False)] if name in ("step 7, as published", "curve 50 %") else []
    if name.startswith("curve"):
        return [(1, 128, True)]
    return [(size, 1024, graphs) for size in (1, 8) for graphs in (False, True)]


def measured(dense, cut, size, length, graphs, new_tokens):
    fraction, multiple = cut
    plan = choose(importance.uniform(dense), dense, removed_fraction=fraction, heads_removed="same_share",
                  multiple_of=multiple if dense.config.hidden_size > 128 else min(multiple, 8))
    pruned = surgery.remove(dense, plan)
    device = next(dense.parameters()).device
    ids = torch.randint(3, 500, (size, length), generator=torch.Generator().manual_seed(0)).to(device)
    took = generation_speed.measure({"dense": dense, "pruned": pruned}, ids, new_tokens=new_tokens, graphs=graphs)
    bound = generation_speed.upper_bound(dense, pruned, ids, (took["dense"].cache_bytes, took["pruned"].cache_bytes))
    row = {"removed_fraction": plan.removed_fraction, **plan.kept, "prefill_bound": bound.prefill,
           "decode_bound": bound.decode}
    for task, whole, smaller in (("prefill", took["dense"].prefill_s, took["pruned"].prefill_s),
                                 ("decode", took["dense"].token_s, took["pruned"].token_s)):
        gain = generation_speed.speedup(whole, smaller)
        row |= {f"{task}_dense_s": generation_speed.median(whole)[0],
                **{f"{task}_gain{end}": value for end, value in zip(("", "_low", "_high"), gain, strict=True)}}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a small model on any machine")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="file that keeps the rows")
    arguments = parser.parse_args()
    if not (arguments.toy or torch.cuda.is_available()):
        raise SystemExit("no GPU here; --toy tries the script on this machine")
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    dense, start = dense_model(arguments.toy), time.perf_counter()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for name, cut in cuts(dense).items():
        for size, length, graphs in settings(name, arguments.toy):
            key = f"{name}, {size} x {length}{', graphs' if graphs else ''}, {device}"
            if key not in kept:
                kept[key] = measured(dense, cut, size, length, graphs, new_tokens=2 if arguments.toy else 16)
                with replacing(arguments.out) as part:
                    part.write_text(json.dumps(kept, indent=1) + "\n")
                row = kept[key]
                print(f"{key:60} reading {row['prefill_gain']:.2f}x (bound {row['prefill_bound']:.2f}), "
                      f"writing {row['decode_gain']:.2f}x (bound {row['decode_bound']:.2f})")
    print(f"{len(kept)} rows in {arguments.out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
