"""The command ``prune``.

Everything that can be refused is refused before the model is scored, and the checkpoint is saved before anything is
measured: a later step that fails loses nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pruning_lib import data
from pruning_lib.cli import hub, measure, output
from pruning_lib.cli.card import provenance, write_card
from pruning_lib.cli.out_folder import refuse_folder, refuse_full_disk, replace_checkpoint
from pruning_lib.experiments import records
from pruning_lib.models import checkpoints, deployment, devices, families
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.pruning import pipeline
from pruning_lib.training import lora

UNRECORDED = {"json", "quiet", "out", "resume", "act", "command", "push_to_hub"}  # no part of the model


def prune(arguments: argparse.Namespace) -> int:
    """Prune a model, save it, measure it, recover it if requested, and write its card."""
    return output.answer(_prune, arguments)


@dataclass
class _Texts:
    """Texts of a command, read before the model is loaded."""

    calibration: list[str]
    long: list[str]
    pairs: list[tuple[str, str]]
    test: list[str]
    fingerprints: dict[str, str] = field(default_factory=dict)


def _prune(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    measure.fill_in(a, calibration=pipeline.CALIBRATION)
    _refuse_early(a)
    texts = _read_texts(a)
    model, tokenizer = measure.language_model(a.model, a)
    _refuse_late(model, a)
    found = pipeline.prune(
        model, tokenizer, method=a.method, removed_fraction=a.removed_fraction, heads_removed=a.heads_removed,
        experts_removed=a.experts_removed, grouped_query=a.grouped_query, criterion=a.criterion,
        blocks_removed=a.blocks_removed, reconstruction=a.reconstruction, multiple_of=a.multiple_of,
        calibration=texts.calibration, reconstruction_text=texts.long or None, seed=a.seed)
    checkpoints.save(found.model, tokenizer, a.out)
    facts = _facts(a, found, texts)
    write_card(a.out, facts)
    output.note(f"saved in {a.out}" + "; measuring" * bool(texts.test or a.tasks != "none"), a)
    with _saved(a.out, "measuring"):
        _measure(facts, "dense", model, tokenizer, texts, a)
        _measure(facts, "pruned", found.model, tokenizer, texts, a)
    if texts.pairs:
        with _saved(a.out, "recovery", way="with --resume recovery goes on from its last checkpoint"):
            _recover(facts, model, found.model, tokenizer, texts, a)
        with _saved(a.out, "measuring"):
            _measure(facts, "recovered", found.model, tokenizer, texts, a)
    shown = {name: values for name, values in facts["measured"].items() if values}
    lines = [*facts["steps"], *(f"{name:9} {output.line(values)}" for name, values in shown.items())]
    lines += [_stored(facts), f"saved in {a.out}"]
    if a.push_to_hub:
        with _saved(a.out, "upload", way="upload it with: hf upload"):
            lines.append(f"uploaded: {hub.upload(a.out, a.push_to_hub)}")
    return facts, "\n".join(lines)


def _stored(facts: dict[str, Any]) -> str:
    stored, computed = facts["stored_dtype"], facts["computed_dtype"]
    return f"reached {facts['reached_fraction']:.4f} of all parameters; weights are {stored}" + (
        f", computed in {computed}" if computed != stored else "")


def _refuse_early(a: argparse.Namespace) -> None:
    """Refuse options that contradict each other or this machine, without the model."""
    devices.check(a.device)
    refuse_folder(a.out, _recorded(a))
    if a.push_to_hub:
        hub.refuse_upload(a.push_to_hub)
    pipeline.validate(a.method, a.criterion, a.blocks_removed, a.reconstruction, a.removed_fraction, a.experts_removed)
    if a.kd_weight and not a.recover:
        raise ValueError(f"kd_weight={a.kd_weight} needs answers to learn from; give --recover with it")
    if a.recover and not find_spec("peft"):
        raise ImportError("--recover needs peft: pip install 'pruning-lib[recovery]'")
    if a.resume and a.resume.exists() and not a.resume.is_dir():
        raise ValueError(f"--resume {a.resume} is a file; give a folder")


def _refuse_late(model: nn.Module, a: argparse.Namespace) -> None:
    """Refuse options that this model cannot take, before it is scored."""
    refuse_full_disk(a.out, model, 1 - (a.removed_fraction or 0))
    note = deployment.head_width_note(cast(Any, model.config).model_type) if a.heads_removed else ""
    if note:
        output.note(note, a)
    if a.recover and next(model.parameters()).dtype == torch.float16:
        raise ValueError("--recover: gradients overflow in float16; give --dtype bfloat16 or float32")


def _read_texts(a: argparse.Namespace) -> _Texts:
    test = measure.texts_of(a, a.model)
    calibration = pipeline.source_texts(a.calibration, a.prompts, pipeline.PROMPTS, a.allow_test_text)
    source = pipeline.long_text(a.reconstruction_text, a.calibration)
    more: list[str] = []
    if source is not None and pipeline.needs_long_text(a.method, a.reconstruction):
        more = pipeline.source_texts(source, a.reconstruction_samples, pipeline.SAMPLES, a.allow_test_text)
    skip = len(calibration) if a.recover and data.same_place(a.recover, a.calibration) else 0
    pairs = data.pairs(a.recover, a.recover_pairs, skip=skip) if a.recover else []
    if not a.allow_test_text:
        _refuse_shared({"--calibration": calibration, "--reconstruction-text": more,
                        "--recover": [prompt for prompt, _ in pairs]}, test)
    prints = {a.calibration: data.fingerprint(calibration)}
    if more:
        prints[f"{source} (long)"] = data.fingerprint(more)
    if pairs:
        prints[f"{a.recover} (recovery)"] = data.fingerprint(prompt + answer for prompt, answer in pairs)
    return _Texts(calibration, more, pairs, test, prints)


def _refuse_shared(used: dict[str, list[str]], test: list[str]) -> None:
    """Raise ValueError where a text that the model is fitted on is a test text too."""
    for option, texts in used.items():
        shared = len(set(texts) & set(test))
        if shared:
            raise ValueError(f"{option}: {shared} of {len(texts)} texts are test text too, so the measurement would be "
                             f"too good; give other text, or --allow-test-text")


def _facts(a: argparse.Namespace, found: pipeline.Pruned, texts: _Texts) -> dict[str, Any]:
    return {"model": a.model, "out": str(a.out), "reached_fraction": found.reached_fraction,
            "parameters": families.parameter_count(found.model), "steps": list(found.steps), "measured": {},
            "losses": [],
            "arguments": _recorded(a), "removed": _removed(found), "made_with": records.made_with(texts.fingerprints),
            **provenance(a.model, found.model)}


def _recorded(a: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(a).items() if key not in UNRECORDED}


def _removed(found: pipeline.Pruned) -> dict[str, Any]:
    """Return removed heads and neurons as one line of indices per block of the dense model, ridges, removed blocks."""
    blocks = {"blocks": list(found.blocks)} if found.blocks else {}
    if found.plan is None:
        return blocks
    if isinstance(found.plan, ExpertPlan):
        return _removed_experts(found.plan)
    parts = {"heads": found.plan.removed_heads, "neurons": found.plan.neurons}
    return {**{part: [" ".join(map(str, sorted(row.tolist()))) for row in rows] for part, rows in parts.items()},
            "ridges": {layer.layer: layer.ridge for layer in found.reconstructions}, **blocks}


def _removed_experts(plan: ExpertPlan) -> dict[str, Any]:
    """Return removed experts, and removed neurons of every expert, as one line of indices per block with experts."""
    def line(numbers: Any) -> str:
        return " ".join(map(str, numbers.tolist()))

    return {"experts": {str(block): line(row) for block, row in zip(plan.sizes.blocks, plan.experts, strict=True)},
            "neurons_of_experts": {str(block): [line(row) for row in rows] for block, rows in zip(
                plan.sizes.blocks, plan.neurons, strict=True)}}


def _measure(facts: dict[str, Any], name: str, model: nn.Module, tokenizer: Any, texts: _Texts, a: argparse.Namespace
             ) -> None:
    """Add the measurements of one model to the facts, and to the files in the folder."""
    values = measure.measured(model, tokenizer, texts.test, a)
    if values:
        facts["measured"][name] = records.finite(values)
        write_card(a.out, facts)


def _recover(facts: dict[str, Any], dense: nn.Module, pruned: nn.Module, tokenizer: Any, texts: _Texts,
             a: argparse.Namespace) -> None:
    """Tune the pruned model with LoRA and replace the checkpoint by the tuned one."""
    settings = lora.Settings(epochs=a.epochs, seed=a.seed, kd_weight=a.kd_weight)
    losses = lora.tune(pruned, tokenizer, texts.pairs, folder=a.resume, settings=settings,
                       teacher=dense if a.kd_weight else None)
    facts["losses"] = losses
    facts["steps"].append(f"LoRA on {len(texts.pairs)} answers of {a.recover}, {a.epochs} epochs, "
                          + f"{a.kd_weight:.0%} of the loss following the dense model, " * bool(a.kd_weight)
                          + f"loss {losses[0]:.3f} to {losses[-1]:.3f}, merged")
    replace_checkpoint(pruned, tokenizer, a.out)
    write_card(a.out, facts)


@contextmanager
def _saved(out: Path, step: str, way: str = "") -> Iterator[None]:
    """Name the saved checkpoint in the error of a later step."""
    way = way or f"measure it with: pruning-lib evaluate {out}"
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(f"{step} failed: {error}\nThe pruned model is saved in {out}; {way}") from error
    except KeyboardInterrupt:
        print(f"\nthe pruned model is saved in {out}; {way}", file=sys.stderr)
        raise
