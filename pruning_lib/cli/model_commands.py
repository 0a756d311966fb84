"""Commands for the user's own model: inspect, prune, evaluate, compare.

Each command prints a few lines, or with ``--json`` one JSON object; progress is printed to standard error.  The folder
of a pruned model contains the checkpoint, ``pruning.json`` with all steps and measurements, and a model card.
Order of this file: registration · inspect · prune · evaluate · compare · model card.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning_lib import data
from pruning_lib._files import replacing
from pruning_lib.evaluation import quality
from pruning_lib.experiments import records
from pruning_lib.models import checkpoints, expert_surgery, families, image_networks, loading, opening
from pruning_lib.models.plan import GROUPED
from pruning_lib.pruning import consensus, importance, pipeline
from pruning_lib.pruning.block_ranking import CRITERIA
from pruning_lib.training import lora

Command = Callable[[argparse.Namespace], tuple[dict[str, Any], str]]


def register(commands: Any) -> None:
    """Add the four commands to the parser of ``pruning-lib``."""
    inspect = _add(commands, "inspect", inspect_model, "possible cuts of a model: fractions and head counts, or blocks")
    inspect.add_argument("model", help="key of models.MODELS, a local folder, or a hub name")
    _add_prune(commands)
    measure = _add(commands, "evaluate", evaluate_model, "perplexity and zero-shot accuracy of one model")
    measure.add_argument("model", help="a folder made by prune, or any other model; the card of a folder is updated")
    _measures(measure)
    pair = _add(commands, "compare", compare_models, "two models with one tokenizer, on the same text and items")
    pair.add_argument("first", help="for example the pruned model")
    pair.add_argument("second", help="for example the dense model")
    _measures(pair)


def _add(commands: Any, name: str, act: Command, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(act=lambda arguments: _answer(name, act, arguments))
    return parser


def _add_prune(commands: Any) -> None:
    parser = _add(commands, "prune", prune_model, "make a model smaller and save it as a plain checkpoint")
    parser.add_argument("--model", required=True, help="key of models.MODELS, a local folder, or a hub name")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the checkpoint")
    parser.add_argument("--removed-fraction", required=True, type=float, help="of all parameters, 0 to 1")
    parser.add_argument("--method", default="amp", choices=[*importance.METHODS, "none"],
                        help="importance of heads and neurons")
    parser.add_argument("--heads-removed", type=int, default=0,
                        help="query heads per block; -1 for the same share of heads and neurons, as in the paper")
    parser.add_argument("--grouped-query", default="whole_groups", choices=GROUPED,
                        help="removal of heads that share keys and values")
    parser.add_argument("--multiple-of", type=int, default=1,
                        help="round the neurons kept per block to a multiple; 8 or 64 for a GPU")
    parser.add_argument("--criterion", default="none", choices=["none", *CRITERIA], help="ranking of blocks")
    parser.add_argument("--blocks-removed", type=int, default=0, help="blocks to remove after heads and neurons")
    parser.add_argument("--reconstruct", default="none", choices=pipeline.RECONSTRUCTIONS,
                        help="least-squares reconstruction of the remaining weights")
    parser.add_argument("--calibration", default="alpaca", choices=data.DATASETS, help="calibration prompts")
    parser.add_argument("--prompts", type=int, default=50, help="number of prompts, from the first on")
    parser.add_argument("--reconstruction-text", default="c4", choices=data.DATASETS,
                        help="text for reconstruction, and for methods that need long text")
    parser.add_argument("--reconstruction-samples", type=int, default=100,
                        help="number of texts, cut at 512 tokens")
    parser.add_argument("--recover", choices=[k for k, v in data.DATASETS.items()
                                              if v.text is data.instruction_prompt],
                        help="then tune with LoRA on these answers; calibration prompts are skipped")
    parser.add_argument("--recover-pairs", type=int, help="number of answers (default: all)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of recovery")
    parser.add_argument("--kd-weight", type=float, default=0.0,
                        help="weight of the distillation loss against the dense model, 0 to 1")
    parser.add_argument("--resume", type=Path, help="folder for checkpoints of recovery; an existing one is resumed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the method random, and of recovery")
    _measures(parser)


def _measures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default="wikitext2", choices=[k for k, v in data.DATASETS.items()
                                                                if "test" in v.splits], help="test text")
    parser.add_argument("--tokens", type=int, default=32768, help="number of tokens of it; 0 for all")
    parser.add_argument("--window", type=int, default=2048, help="longest context in tokens")
    parser.add_argument("--tasks", default="none", choices=quality.TASKS, help="zero-shot tasks")
    parser.add_argument("--dtype", default="float32", choices=loading.DTYPES,
                        help="number format of weights and arithmetic")
    parser.add_argument("--merge-adapter", action="store_true",
                        help="the folder holds an adapter: add it to the weights of its base model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")


def _answer(name: str, act: Command, arguments: argparse.Namespace) -> int:
    """Execute a command; print errors that the user can correct to standard error and return status 1."""
    for talkative in ("lm_eval", "accelerate"):  # hide warnings about their internals
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        facts, text = act(arguments)
    except (ValueError, OSError, ConnectionError) as error:
        print(f"pruning-lib {name}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=1) if arguments.json else text)
    return 0


def inspect_model(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the possible cuts of a model; a language model is read from its config alone."""
    from transformers import AutoModelForCausalLM

    source = loading.find(arguments.model)
    if Path(source).is_dir() and image_networks.is_image_network(Path(source)):
        return _inspect_image_network(arguments.model, image_networks.read(Path(source)))
    try:
        config = opening.config_of(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{arguments.model!r} has no config of a causal language model; "
                         f"give another model ({error})") from error
    s, facts = families.sizes(model), lossless_cuts(model)
    lines = [f"{arguments.model}: {facts['family']}, {s.parameters:,} parameters, {s.blocks} blocks of {s.heads} heads "
             f"in {s.groups} groups and {s.neurons} neurons",
             f"all neurons but one: {facts['neurons_fraction']:.3f} of all parameters; one block: "
             f"{facts['block_fraction']:.4f}",
             "heads that can be removed from every block (--heads-removed), and possible fractions "
             "(--removed-fraction):"]
    for cut in facts["cuts"]:
        reach = cut["refused"] or f"{cut['least_fraction']:.4f} to {cut['most_fraction']:.4f}"
        lines.append(f"  {cut['heads_removed']:3d}  {cut['grouped_query']:13s}  {reach}")
    lines += [f"{unit} cannot be removed: {reason}" for unit, reason in facts["refused"].items()
              if reason not in ("", families.NO_EXPERTS)]
    if not facts["refused"]["experts"]:
        e = expert_surgery.sizes(model)
        lines.append(f"{len(e.blocks)} blocks have {e.experts} experts of {e.neurons} neurons; both can be removed "
                     f"(pruning.expert_importance)")
    return {"model": arguments.model, **facts}, "\n".join(lines)


def _inspect_image_network(name: str, network: Any) -> tuple[dict[str, Any], str]:
    """Return the removable blocks of an image network: blocks that keep the shape, if one per stage remains."""
    infos = families.residual_blocks(network)
    stages = {info.stage: [other for other in infos if other.stage == info.stage] for info in infos}
    facts = {"model": name, "network": network.config.network, "parameters": families.parameter_count(network),
             "blocks": [info.name for info in infos], "removable": [info.name for info in infos if info.removable],
             "most_blocks_removed": consensus.max_removable(network, min_blocks=1)}
    lines = [f"{name}: {facts['network']}, {facts['parameters']:,} parameters, {len(infos)} blocks; "
             f"{facts['most_blocks_removed']} can be removed together if every stage keeps one",
             "blocks that can be removed, stage by stage (with consensus.prune, or: pruning-lib run consensus_prune -p "
             f"model={name}):"]
    for stage, members in stages.items():
        free = ", ".join(info.name for info in members if info.removable)
        lines.append(f"  stage {stage + 1}, {len(members)} blocks  {free or 'none'}")
    return facts, "\n".join(lines)


def language_model(name: str, arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Load a language model and its tokenizer; raise ValueError for an image network."""
    model, tokenizer = loading.load_model(name, dtype=arguments.dtype, device=arguments.device,
                                          merge_adapter=arguments.merge_adapter)
    if tokenizer is None:
        raise ValueError(f"{name!r} is an image network; this command is for language models. Remove blocks with "
                         f"consensus.prune, or with: pruning-lib run consensus_prune -p model={name}")
    return model, tokenizer


def lossless_cuts(model: nn.Module) -> dict[str, Any]:
    """Return the sizes of a language model, and every lossless cut of its heads with the fractions that it allows."""
    s, refused = families.sizes(model), families.removable(model)
    per_group, cuts = s.heads // max(s.groups, 1), []
    units = [("whole_groups", g * per_group, g * (per_group * s.head_parameters + s.group_parameters))
             for g in range(s.groups)]
    units += [("equal_queries", q * s.groups, q * s.groups * s.head_parameters) for q in range(1, per_group)]
    for cut, heads, parameters in units:
        reason = refused["heads"]
        try:
            families.refuse_head_count(model, s.heads - heads)
        except ValueError as error:
            reason = reason or str(error)
        least = s.blocks * parameters / s.parameters
        most = least + s.blocks * (s.neurons - 1) * s.neuron_parameters / s.parameters
        cuts.append({"grouped_query": cut, "heads_removed": heads, "least_fraction": least, "most_fraction": most,
                     "refused": reason})
    block = families.parameter_count(families.blocks(model)[0])
    return {"family": model.config.model_type, "parameters": s.parameters, "blocks": s.blocks,  # type: ignore[union-attr]
            "heads": s.heads, "groups": s.groups, "head_width": s.head_width, "neurons": s.neurons, "width": s.width,
            "neurons_fraction": s.blocks * (s.neurons - 1) * s.neuron_parameters / s.parameters,
            "block_fraction": block / s.parameters, "cuts": cuts, "refused": refused}


def prune_model(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Prune a model, recover it if requested, measure before and after, save it, and write its card."""
    a = arguments
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise FileExistsError(f"{a.out} exists and is not empty; give another folder or remove it first")
    if not 0 <= a.kd_weight <= bool(a.recover):
        raise ValueError(f"--kd-weight {a.kd_weight}: give 0 to 1, and --recover with it")
    texts, used = data.texts(a.calibration, a.prompts), {}
    used[a.calibration] = data.fingerprint(texts)
    pairs = data.pairs(a.recover, a.recover_pairs, skip=a.prompts) if a.recover else []
    tuning, losses = lora.Settings(epochs=a.epochs, seed=a.seed, kd_weight=a.kd_weight), []
    model, tokenizer = language_model(a.model, a)
    long = a.reconstruct != "none" or (a.method != "none" and importance.METHODS[a.method].needs_text)
    more = data.texts(a.reconstruction_text, a.reconstruction_samples) if long else []
    found = pipeline.prune(
        model, data.batches(texts, tokenizer), method=a.method, removed_fraction=a.removed_fraction,
        heads_removed=None if a.heads_removed < 0 else a.heads_removed, grouped_query=a.grouped_query,
        criterion=a.criterion, blocks_removed=a.blocks_removed, reconstruction=a.reconstruct, multiple_of=a.multiple_of,
        text=data.batches(more, tokenizer) if more else (), seed=a.seed)
    measured = {"dense": measure(model, tokenizer, a), "pruned": measure(found.model, tokenizer, a)}
    steps = [*found.steps]
    if more:
        used[f"{a.reconstruction_text} (long)"] = data.fingerprint(more)
        steps.append(f"reconstruction: {a.reconstruct}; long text: {len(more)} texts of {a.reconstruction_text}")
    if pairs:
        losses = lora.tune(found.model, tokenizer, pairs, folder=a.resume, settings=tuning,
                              teacher=model if a.kd_weight else None)
        steps.append(f"LoRA on {len(pairs)} answers of {a.recover}, {a.epochs} epochs, "
                     + f"{a.kd_weight:.0%} of the loss following the dense model, " * bool(a.kd_weight)
                     + f"loss {losses[0]:.3f} to {losses[-1]:.3f}, merged")
        measured["recovered"] = measure(found.model, tokenizer, a)
        used[f"{a.recover} (recovery)"] = data.fingerprint(prompt + answer for prompt, answer in pairs)
    checkpoints.save(found.model, tokenizer, a.out)
    facts = {"model": a.model, "out": str(a.out), "reached_fraction": found.reached_fraction,
             "parameters": families.parameter_count(found.model), "steps": steps, "measured": measured,
             "losses": losses,
             "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(a).items()
                           if key not in {"json", "out", "resume"} and not callable(value)},
             "removed": _removed(found), "made_with": records.made_with(used)}
    write_card(a.out, facts)
    lines = [*steps, *(f"{name:9} {_line(values)}" for name, values in measured.items()), f"saved in {a.out}"]
    return facts, "\n".join(lines)


def _removed(found: pipeline.Pruned) -> dict[str, Any]:
    """Return removed heads and neurons as one line of indices per block of the dense model, ridges, removed blocks."""
    blocks = {"blocks": list(found.blocks)} if found.blocks else {}
    if found.plan is None:
        return blocks
    parts = {"heads": found.plan.removed_heads, "neurons": found.plan.neurons}
    return {**{part: [" ".join(map(str, sorted(row.tolist()))) for row in rows] for part, rows in parts.items()},
            "ridges": {layer.layer: layer.ridge for layer in found.reconstructions}, **blocks}


def measure(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity and, if requested, zero-shot tasks; the correctness of answers is packed under ``items``."""
    texts = data.texts(arguments.text, split="test")
    values: dict[str, Any] = {"text": arguments.text, **quality.perplexity(
        model, tokenizer, texts, window=arguments.window, stride=arguments.window, max_tokens=arguments.tokens or None)}
    if arguments.tasks != "none":
        accuracies, items = quality.zero_shot(model, tokenizer, arguments.tasks)
        values.update(accuracies, tasks=arguments.tasks, items=items)
    return values


def evaluate_model(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure one model; update the card of a model pruned by this package."""
    model, tokenizer = language_model(arguments.model, arguments)
    values = measure(model, tokenizer, arguments)
    record = Path(arguments.model) / "pruning.json"
    if record.is_file():
        facts = json.loads(record.read_text())
        facts["measured"][f"evaluated {len(facts['measured'])}"] = values
        write_card(record.parent, facts)
    return {"model": arguments.model, **values}, f"{arguments.model}: {_line(values)}"


def compare_models(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure two models on the same text and items."""
    found, lines, tokens = {}, [], []
    for name in (arguments.first, arguments.second):
        model, tokenizer = language_model(name, arguments)
        tokens.append([tokenizer(text)["input_ids"] for text in data.texts(arguments.text, split="test")])
        found[name] = {"parameters": families.parameter_count(model), **measure(model, tokenizer, arguments)}
        lines.append(f"{name}: {found[name]['parameters']:,} parameters, {_line(found[name])}")
    first, second = (found[name] for name in (arguments.first, arguments.second))
    alike = tokens[0] == tokens[1]  # perplexity is per token
    facts: dict[str, Any] = {"first": first, "second": second,
                             "perplexity_ratio": first["perplexity"] / second["perplexity"] if alike else None,
                             "parameters_ratio": first["parameters"] / second["parameters"]}
    lines.append(f"first / second: parameters {facts['parameters_ratio']:.4f}, perplexity "
                 + (f"{facts['perplexity_ratio']:.3f}" if alike else
                    "not compared: the tokenizers cut this text into other tokens; --tasks compares the two"))
    if "items" in first:
        facts["paired"] = quality.paired(first["items"], second["items"])
        lines.append("first - second: mean accuracy {difference_fraction:+.3f} [{difference_low:+.3f}, "
                     "{difference_high:+.3f}], 95 %".format(**facts["paired"]))
    return facts, "\n".join(lines)


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``pruning.json`` and the model card ``README.md``."""
    for name, text in (("pruning.json", json.dumps(facts, indent=1)), ("README.md", card(facts))):
        with replacing(folder / name) as beside:
            beside.write_text(text + "\n")


def card(facts: dict[str, Any]) -> str:
    """Return the model card: steps, data, measurements, and code to load the model."""
    made = facts["made_with"]
    rows = [f"| {name} | {_perplexity(v)} | {v['text']}, "
            f"{v['tokens']} tokens, window {v['window']} | {_accuracy(v)} |" for name, v in facts["measured"].items()]
    used = "\n".join(f"- {name}, fingerprint `{print_}`" for name, print_ in made["data"].items())
    return "\n".join([
        "---", "library_name: transformers", "tags: [pruned]", "---", f"# {facts['model']}, pruned", "",
        f"{facts['parameters']:,} parameters: {facts['reached_fraction']:.2%} of all parameters of `{facts['model']}` "
        f"were removed. The licence of the original model applies.", "", "## What was done", "",
        *(f"- {step}" for step in facts["steps"]), "",
        *(["`pruning.json` names every removed head, neuron and block.", ""] if facts.get("removed") else []),
        "## Calibration and recovery data", "", used, "",
        "## Measured", "",
        "| model | perplexity and 95 % interval | on | zero-shot, mean |", "| --- | --- | --- | --- |",
        *rows, "", "## Load it", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", "",
        f"Made with pruning_lib ({made['commit']}), torch {made['torch']}, transformers {made['transformers']}."])


def _accuracy(values: dict[str, Any]) -> str:
    tasks = values.get("tasks")
    return f"{values[f'{tasks}_mean_fraction']:.3f} ({tasks})" if tasks else "not measured"


def _perplexity(values: dict[str, Any]) -> str:
    """Return perplexity with its interval as text; a single window gives no interval."""
    if values["perplexity_low"] is None:
        return f"{values['perplexity']:.2f} [no interval from one window]"
    return f"{values['perplexity']:.2f} [{values['perplexity_low']:.2f}, {values['perplexity_high']:.2f}]"


def _line(values: dict[str, Any]) -> str:
    text = f"perplexity {_perplexity(values)} on {values['tokens']} tokens of {values['text']}"
    return text + f", mean accuracy {_accuracy(values)}" * ("tasks" in values)
