"""The model card of a pruned folder, and the record ``pruning.json`` that it is made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from pruning_lib import __version__
from pruning_lib._files import digest, replacing
from pruning_lib.cli.output import accuracy, json_text, perplexity
from pruning_lib.models import checkpoints, loading

BEGIN, END = "<!-- pruning-lib {} -->", "<!-- pruning-lib end: what you write outside these two lines is kept -->"

TABLE = ("## Measured", "",
         "| model | perplexity and 95 % interval | on | zero-shot, mean |", "| --- | --- | --- | --- |")


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``pruning.json`` and the model card ``README.md``; words of a user in the card are kept."""
    path = folder / "README.md"
    before = path.read_text() if path.exists() else ""
    for name, text in (("pruning.json", json_text(facts) + "\n"), (path.name, _renewed(before, facts))):
        if not (name == path.name and text == before):
            with replacing(folder / name) as beside:
                beside.write_text(text)


def provenance(name: str, model: nn.Module) -> dict[str, Any]:
    """Return the facts of the card on the model that was pruned: hub name, licence, number formats, version."""
    source = Path(loading.find(name))
    stated = _front_matter(source / "README.md")
    entry = loading.MODELS.get(name)
    base = getattr(entry, "base_model", "") or (name if _on_hub(name) else stated.get("base_model", ""))
    licence = getattr(entry, "licence", "") or stated.get("license", "")
    stored, computed = (str(dtype).removeprefix("torch.") for dtype in (checkpoints.stored_dtype(model), model.dtype))
    return {"base_model": base, "license": licence.lower(), "stored_dtype": stored, "computed_dtype": computed,
            "pruning_lib": __version__}


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists()


def _front_matter(path: Path) -> dict[str, str]:
    """Return the plain ``key: value`` lines between the first two lines ``---`` of a model card."""
    if not path.is_file():
        return {}
    parts = path.read_text(errors="replace").split("---\n")
    lines = [line.partition(":") for line in parts[1].splitlines()] if len(parts) > 2 and not parts[0].strip() else []
    return {key.strip(): value.strip().strip("\"'") for key, colon, value in lines if colon and value.strip()}


def _renewed(before: str, facts: dict[str, Any]) -> str:
    """Return the card with our part renewed; a part that somebody changed, or took out, is left as it is."""
    text = card(facts)
    ours = f"{BEGIN.format(digest(text))}\n{text}\n{END}\n"
    if not before:
        return _head(facts) + ours
    found = re.search(BEGIN.format("([0-9a-f]+)") + r"\n(.*?)\n" + re.escape(END) + r"\n", before, re.DOTALL)
    if not found or digest(found[2]) != found[1]:
        return before
    return before[:found.start()] + ours + before[found.end():]


def _head(facts: dict[str, Any]) -> str:
    """Return the lines that the hub reads; unknown facts are omitted."""
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": facts.get("base_model"),
              "license": facts.get("license"), "tags": "[pruned]"}
    return "\n".join(["---", *(f"{key}: {value}" for key, value in fields.items() if value), "---", ""])


def card(facts: dict[str, Any]) -> str:
    """Return our part of the model card: steps, data, measurements, and code to load the model.

    A card is often published, so a local folder is named without the path to it.
    """
    made, model = facts["made_with"], _public(facts["model"])
    commit = made["commit"] if made["commit"] != "unknown" else ""
    rows = [f"| {name} | {perplexity(v)} | {_conditions(v)} | {accuracy(v)} |"
            for name, v in facts["measured"].items()]
    used = "\n".join(f"- {_public(name)}, fingerprint `{print_}`" for name, print_ in made["data"].items())
    return "\n".join([
        f"# {model}, pruned", "",
        f"{facts['parameters']:,} parameters: {facts['reached_fraction']:.2%} of all parameters of `{model}` "
        f"were removed. {_formats(facts)}The licence of the original model applies.", "", "## What was done", "",
        *(f"- {step}" for step in facts["steps"]), "",
        *(["`pruning.json` names every removed head, neuron and block.", ""] if facts.get("removed") else []),
        "## Calibration and recovery data", "", used, "",
        *([*TABLE, *rows, ""] if rows else []), "## Load it", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", "",
        f"Made with pruning_lib {facts.get('pruning_lib', __version__)}{f' (commit {commit})' * bool(commit)}, "
        f"torch {made['torch']}, transformers {made['transformers']}."])


def _public(name: str) -> str:
    """Return the last part of an absolute path, or of one out of the current folder; any other name as it is."""
    return Path(name).name if name.startswith(("/", "~", "..")) else name


def _formats(facts: dict[str, Any]) -> str:
    stored, computed = facts.get("stored_dtype"), facts.get("computed_dtype")
    if not stored:
        return ""
    return f"Weights are {stored}{f'; pruning computed in {computed}' * (stored != computed)}. "


def _conditions(values: dict[str, Any]) -> str:
    """Return text, tokens, window and BOS token of a perplexity; empty where it was not measured."""
    if "text" not in values:
        return ""
    bos = ", BOS token in front of each window" if values.get("bos_token") else ""
    return f"{_public(values['text'])}, {values['tokens']} tokens, window {values['window']}{bos}"
