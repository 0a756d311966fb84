"""The model card of a pruned folder, and the record ``pruning.json`` that it is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pruning_lib.cli.output import accuracy, json_text, perplexity

TABLE = ("## Measured", "",
         "| model | perplexity and 95 % interval | on | zero-shot, mean |", "| --- | --- | --- | --- |")


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``pruning.json`` and the model card ``README.md``."""
    for name, text in (("pruning.json", json_text(facts)), ("README.md", card(facts))):
        beside = folder / f".{name}.part"
        beside.write_text(text + "\n")
        beside.replace(folder / name)


def card(facts: dict[str, Any]) -> str:
    """Return the model card: steps, data, measurements, and code to load the model."""
    made = facts["made_with"]
    rows = [f"| {name} | {perplexity(v)} | {_conditions(v)} | {accuracy(v)} |"
            for name, v in facts["measured"].items()]
    used = "\n".join(f"- {name}, fingerprint `{print_}`" for name, print_ in made["data"].items())
    return "\n".join([
        "---", "library_name: transformers", "tags: [pruned]", "---", f"# {facts['model']}, pruned", "",
        f"{facts['parameters']:,} parameters: {facts['reached_fraction']:.2%} of all parameters of `{facts['model']}` "
        f"were removed. The licence of the original model applies.", "", "## What was done", "",
        *(f"- {step}" for step in facts["steps"]), "",
        *(["`pruning.json` names every removed head, neuron and block.", ""] if facts.get("removed") else []),
        "## Calibration and recovery data", "", used, "",
        *([*TABLE, *rows, ""] if rows else []), "## Load it", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", "",
        f"Made with pruning_lib ({made['commit']}), torch {made['torch']}, transformers {made['transformers']}."])


def _conditions(values: dict[str, Any]) -> str:
    """Return text, tokens, window and BOS token of a perplexity; empty where it was not measured."""
    if "text" not in values:
        return ""
    bos = ", BOS token in front of each window" if values.get("bos_token") else ""
    return f"{values['text']}, {values['tokens']} tokens, window {values['window']}{bos}"
