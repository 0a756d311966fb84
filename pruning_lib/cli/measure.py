"""The commands ``evaluate`` and ``compare``, and measuring as all commands do it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from pruning_lib import data
from pruning_lib.cli import output
from pruning_lib.cli.card import write_card
from pruning_lib.evaluation import quality
from pruning_lib.evaluation.harness_tasks import check_tasks
from pruning_lib.experiments.records import finite
from pruning_lib.models import devices, families, loading, opening

TEXT = "wikitext2"  # measured without --text


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure one model; update the card of a model pruned by this package."""
    return output.answer(_evaluate, arguments)


def compare(arguments: argparse.Namespace) -> int:
    """Measure two models on the same text and items."""
    return output.answer(_compare, arguments)


def fill_in(arguments: argparse.Namespace, **defaults: str) -> None:
    """Set options for texts that were not given; note which text of this package stands in for which default."""
    for option, default in {"text": TEXT, **defaults}.items():
        if getattr(arguments, option) is None:
            name = data.default_name(default)
            setattr(arguments, option, name)
            if name != default:
                output.note(f'--{option} {name}, which is part of this package: {default} needs pip install '
                            f'"pruning-lib[eval]"; your own text: --{option} FILE', arguments)


def texts_of(arguments: argparse.Namespace, *models: str) -> list[str]:
    """Return the texts of ``--text``, none for ``none``; ValueError for unknown models and wrong options of measuring.

    Everything that can be refused before a model is loaded is refused here.
    """
    devices.check(arguments.device)
    for name in models:
        folder = Path(loading.find(name))
        if not arguments.merge_adapter and (base := opening.adapter_base(folder)) is not None:
            opening.refuse_adapter(folder, base)
    if arguments.dtype not in loading.DTYPES:
        raise ValueError(f"dtype={arguments.dtype!r}; allowed: {', '.join(loading.DTYPES)}")
    check_tasks(arguments.tasks)
    return [] if arguments.text == "none" else data.texts(arguments.text, split="test")


def language_model(name: str, arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Load a language model and its tokenizer; ValueError for an image network, and for a window it cannot take."""
    model, tokenizer = loading.load_model(name, dtype=arguments.dtype, device=arguments.device,
                                          merge_adapter=arguments.merge_adapter)
    if tokenizer is None:
        raise ValueError(f"{name!r} is an image network; this command is for language models. Remove blocks with "
                         f"pl.prune_blocks, or with: pruning-lib run consensus_prune -p model={name}")
    if arguments.text != "none":
        quality.check_window(model, arguments.window)
    return model, tokenizer


def measured(model: nn.Module, tokenizer: Any, texts: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return perplexity and, if requested, zero-shot accuracy; the correctness of answers is packed under ``items``."""
    values: dict[str, Any] = {}
    if texts:
        values = {"text": arguments.text, **quality.perplexity(
            model, tokenizer, texts, window=arguments.window, max_tokens=arguments.tokens)}
    if arguments.tasks != "none":
        accuracies, items = quality.zero_shot(model, tokenizer, arguments.tasks)
        values.update(accuracies, tasks=arguments.tasks, items=items)
    return values


def _evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    texts = _texts_to_measure(arguments, arguments.model)
    model, tokenizer = language_model(arguments.model, arguments)
    values = measured(model, tokenizer, texts, arguments)
    record = Path(arguments.model) / "pruning.json"
    if record.is_file():
        facts = json.loads(record.read_text())
        facts["measured"][f"evaluated {len(facts['measured'])}"] = finite(values)
        write_card(record.parent, facts)
    return {"model": arguments.model, **values}, f"{arguments.model}: {output.line(values)}"


def _texts_to_measure(arguments: argparse.Namespace, *models: str) -> list[str]:
    fill_in(arguments)
    texts = texts_of(arguments, *models)
    if not texts and arguments.tasks == "none":
        raise ValueError("nothing to measure: --text and --tasks are both none; give one of them")
    return texts


def _compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    texts = _texts_to_measure(arguments, arguments.first, arguments.second)
    found, lines, tokens = [], [], []
    for name in (arguments.first, arguments.second):
        model, tokenizer = language_model(name, arguments)
        tokens.append([tokenizer(text)["input_ids"] for text in texts])
        found.append({"parameters": families.parameter_count(model), **measured(model, tokenizer, texts, arguments)})
        lines.append(f"{name}: {found[-1]['parameters']:,} parameters, {output.line(found[-1])}")
    first, second = found
    facts: dict[str, Any] = {"first": first, "second": second, "perplexity_ratio": None,
                             "parameters_ratio": first["parameters"] / second["parameters"]}
    lines.append(f"first / second: parameters {facts['parameters_ratio']:.4f}")
    if texts and tokens[0] == tokens[1]:  # perplexity is per token
        facts["perplexity_ratio"] = first["perplexity"] / second["perplexity"]
        lines[-1] += f", perplexity {facts['perplexity_ratio']:.3f}"
    elif texts:
        lines[-1] += (", perplexity not compared: the tokenizers cut this text into other tokens; --tasks compares "
                      "the two")
    if first.get("items"):
        facts["paired"] = quality.paired(first["items"], second["items"])
        lines.append("first - second: mean accuracy {difference_fraction:+.3f} [{difference_low:+.3f}, "
                     "{difference_high:+.3f}], 95 %".format(**facts["paired"]))
    return facts, "\n".join(lines)
