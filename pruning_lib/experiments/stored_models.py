"""Pruned language models and their GGUF files, each made once: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pruning_lib
from pruning_lib._files import cache, digest, new_folder, replacing
from pruning_lib.data import fingerprint
from pruning_lib.models import checkpoints, gguf_export, loading
from pruning_lib.pruning import pipeline


def checkpoint(model: str, *, dtype: str = "float32", **arguments: Any) -> Path:
    """Return the folder of a model in the cache: whole, or pruned with ``arguments``.

    Parameters
    ----------
    model : key of ``models.MODELS``, a local folder, or a hub name
    arguments : of ``pipeline.prune``, numbers and names only; none for the whole model
    """
    texts = {name: fingerprint(pipeline.source_texts(arguments[name], arguments.get(count), most)) for name, count, most
             in (("calibration", "prompts", pipeline.PROMPTS),
                 ("reconstruction_text", "reconstruction_samples", pipeline.SAMPLES)) if name in arguments}
    key = json.dumps({"model": model, "dtype": dtype, "arguments": arguments, "texts": texts,
                      "torch": torch.__version__}, sort_keys=True)
    folder = cache() / "stored" / digest(key)
    if not folder.exists():
        network, tokenizer = loading.load_model(model, dtype=dtype)
        steps = {"removed_fraction": 0.0}
        if arguments:
            result = pipeline.prune(network, tokenizer, **arguments)
            network, steps = result.model, {"removed_fraction": result.reached_fraction, **result.seconds}
        with new_folder(folder) as part:
            checkpoints.save(network, tokenizer, part / "model")
            (part / "made.json").write_text(json.dumps({"key": key, **steps}))
    return folder / "model"


def facts(folder: Path) -> dict[str, Any]:
    """Return the removed fraction of a model of ``checkpoint``, and the seconds of its scores and reconstruction."""
    return {name: value for name, value in json.loads((folder.parent / "made.json").read_text()).items()
            if name != "key"}


def gguf(folder: Path, format: str) -> Path:
    """Return the GGUF file of a model of ``checkpoint`` in one format, a key of ``gguf_types.FORMATS``."""
    path = folder.parent / f"{format}.gguf"
    return path if path.exists() else gguf_export.export(folder, path, format=format).path


def measured(path: Path, task: str, make: Callable[[], Any], **settings: Any) -> Any:
    """Return the result of ``make()`` about a file, a JSON value; called once for the same settings, then read."""
    kept = path.with_name(f"{path.stem}-{task}-{digest(json.dumps(settings, sort_keys=True))}.json")
    if not kept.exists():
        result = json.dumps({"version": pruning_lib.__version__, "settings": settings, "found": make()})
        with replacing(kept) as part:
            part.write_text(result)
    return json.loads(kept.read_text())["found"]
