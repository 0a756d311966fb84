"""Prune the default model with other libraries and with this one, side by side: quality, time, memory, plain reload.

optipfair       OptiPFair 0.4.2, ``prune_model`` without data (PPM) and with a dataloader (PPM with activations)
torch-pruning   Torch-Pruning 1.6.1, ``BasePruner`` on the MLPs with magnitude and Taylor importance
ours            this library: AMP, the score of OptiPFair in our own code, AMP with sequential reconstruction

All remove the same number of neurons from every block and look at the same prompts, one prompt per batch where a
library pads wrongly otherwise.  Each runs in a process of its own, so that peak memory is its own: the largest resident
set while it scores and cuts, the loaded model included.  Install the rivals first, without their dependencies:
``pip install --no-deps optipfair==0.4.2 torch-pruning==1.6.1``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pruning_lib import data
from pruning_lib.data.batching import batches as make_batches
from pruning_lib.evaluation import quality
from pruning_lib.models import checkpoints, families, loading
from pruning_lib.pruning import peak_to_peak, pipeline

OUT = Path(__file__).resolve().parents[2] / "data" / "inputs" / "rivals.json"


def one_by_one(prompts, tokenizer):
    """A batch per prompt: OptiPFair counts padding, and a Taylor loss would."""
    return [batch for prompt in prompts for batch in make_batches([prompt], tokenizer)]


def optipfair(model, batches, neurons, *, data_driven):
    from optipfair import prune_model

    M = model.config.intermediate_size
    prune_model(model, neuron_selection_method="MAW", pruning_percentage=100 * (neurons + 0.5) / M,  # it rounds down
                dataloader=batches if data_driven else None, show_progress=False)
    return model


def torch_pruning(model, batches, neurons, *, taylor):
    import torch_pruning

    M = model.config.intermediate_size
    if taylor:
        for batch in batches:
            (model(**batch, labels=batch["input_ids"], use_cache=False).loss / len(batches)).backward()
    score = torch_pruning.importance.TaylorImportance() if taylor else torch_pruning.importance.MagnitudeImportance(p=2)
    ratios = {block.mlp.gate_proj: (neurons - 0.5) / M for block in families.blocks(model)}  # it rounds up
    model.config.use_cache = False  # it follows every tensor that comes out of the model
    torch_pruning.pruner.BasePruner(model, {"input_ids": batches[0]["input_ids"]}, importance=score, pruning_ratio=0.0,
                                    pruning_ratio_dict=ratios, round_to=None).step()
    model.zero_grad()
    return model


def ours(model, batches, neurons, *, method, reconstruction="none", text=()):
    fraction = neurons * families.sizes(model).neuron_parameters * len(families.blocks(model)) / families.sizes(
        model).parameters
    return pipeline.prune(model, batches, method=method, removed_fraction=fraction, heads_removed=0, multiple_of=1,
                          reconstruction=reconstruction, text=text).model


RIVALS = {
    "AMP, ours": (ours, {"method": "amp"}),
    "peak-to-peak x activation, ours": (ours, {"method": "peak_to_peak"}),
    "AMP and sequential reconstruction, ours": (ours, {"method": "amp", "reconstruction": "sequential"}),
    "OptiPFair, static": (optipfair, {"data_driven": False}),
    "OptiPFair, data-driven": (optipfair, {"data_driven": True}),
    "Torch-Pruning, magnitude": (torch_pruning, {"taylor": False}),
    "Torch-Pruning, Taylor": (torch_pruning, {"taylor": True}),
}


def reloaded(model, tokenizer, *, own):
    """Return whether plain transformers loads the saved model with the same logits, else its message."""
    ids = torch.arange(1, 17)[None]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        try:
            path = Path(folder) / "pruned"
            checkpoints.save(model, tokenizer, path) if own else model.save_pretrained(path)
            again = AutoModelForCausalLM.from_pretrained(path)
            same = torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
            return "same logits" if same else "other logits"
        except Exception as error:  # libraries raise many types; the message is the result
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def measure(name, arguments):
    """Run one rival in this process and return its line of the table."""
    torch.set_num_threads(arguments.threads)
    model, tokenizer = loading.load_model(arguments.model)
    function, options = RIVALS[name]
    if options.get("reconstruction"):
        texts = data.texts(arguments.reconstruction_text, arguments.texts)
        options = {**options, "text": make_batches(texts, tokenizer)}
    prompts = data.texts(arguments.calibration, arguments.prompts)
    batches = make_batches(prompts, tokenizer) if function is ours else one_by_one(prompts, tokenizer)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        pruned = function(model, batches, arguments.neurons, **options)
    except Exception as error:
        return {"name": name, "refused": f"{type(error).__name__}: {str(error)[:300]}"}
    line = {"name": name, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "parameters": sum(p.numel() for p in pruned.parameters()),
            "reload": reloaded(pruned, tokenizer, own=function is ours)}
    kept = families.blocks(pruned)[0].mlp.gate_proj.out_features
    if pruned.config.intermediate_size != kept:  # corrected by hand, as its user would have to
        pruned.config.intermediate_size = kept
        line["reload_corrected"] = reloaded(pruned, tokenizer, own=False)
    found = quality.perplexity(pruned, tokenizer, data.texts(arguments.text, split="test"), window=arguments.window,
                               stride=arguments.window, max_tokens=arguments.tokens, progress=False)
    return {**line, "neurons_kept": kept, **found}


def score_difference(model, tokenizer, prompts):
    """Largest relative difference of the data-driven scores, OptiPFair's own functions against ours."""
    from optipfair.pruning import mlp_glu

    batches, found = one_by_one(prompts, tokenizer), []
    handles = mlp_glu.setup_mlp_hooks_for_importance(model, torch.device("cpu"))
    mlp_glu.run_calibration_forward_passes(model, batches, torch.device("cpu"), show_progress=False)
    norms = mlp_glu.get_activation_norms()
    for handle in handles:
        handle.remove()
    score = peak_to_peak.importance(model, make_batches(prompts, tokenizer), progress=False).neurons
    for i, block in enumerate(families.blocks(model)):
        theirs = mlp_glu.compute_neuron_pair_importance_maw_hybrid(
            *(p.weight.detach() for p in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)), norms[i])
        found.append(((score[i] - theirs).abs() / theirs).max().item())
    return max(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--neurons", type=int, default=519, help="neurons removed from every block")
    parser.add_argument("--calibration", default="mini_prompts")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--text", default="mini_text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--reconstruction-text", default="mini_calibration_text")
    parser.add_argument("--texts", type=int, default=10, help="texts for reconstruction; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(RIVALS), default=list(RIVALS), metavar="NAME",
                        help="measure only these; with --write the other lines stay as they were")
    parser.add_argument("--write", action="store_true", help=f"write the table to data/inputs/{OUT.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompts, lines = data.texts(arguments.calibration, arguments.prompts), []
    spawn = multiprocessing.get_context("spawn")
    for name in arguments.only:
        if "reconstruction" in name and not arguments.texts:
            continue
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            lines.append(process.submit(measure, name, arguments).result())
        print({k: v for k, v in lines[-1].items() if k != "windows"}, flush=True)
    difference = score_difference(*loading.load_model(arguments.model), prompts[:8])
    print(f"our score of OptiPFair's differs from its own by {difference:.1e} at most, relative")
    if arguments.write:
        before = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
        lines = {line["name"]: line for line in (*before, *lines)}
        lines = [lines[name] for name in RIVALS if name in lines]
        del arguments.only, arguments.write
        versions = {name: metadata.version(name) for name in ("optipfair", "torch-pruning", "torch", "transformers")}
        OUT.write_text(json.dumps({"arguments": vars(arguments), "versions": versions, "score_difference": difference,
                                   "prompts": data.fingerprint(prompts), "rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
