"""Tasks of lm-eval by name: the two sets of this project, and any task or group of lm-eval.

A list of tasks is written ``"official"``, ``"mini"``, ``"none"``, or as names joined by commas; a name may also be the
path of a task's YAML file.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pruning_lib._extras import extra
from pruning_lib._registry import nearest
from pruning_lib.data.text import INPUTS

# task -> reported kind of accuracy: acc compares log-likelihoods, acc_norm log-likelihoods per character
OFFICIAL = {"piqa": "acc_norm", "hellaswag": "acc_norm", "winogrande": "acc", "arc_easy": "acc_norm",
            "arc_challenge": "acc_norm"}
TASKS = {"official": OFFICIAL, "mini": {f"mini_{name}": kind for name, kind in OFFICIAL.items()}, "none": {}}
KINDS = ("acc_norm", "acc", "exact_match")  # the reported kind of other tasks is the first that they have


def check_tasks(tasks: str) -> None:
    """Raise ValueError, with the nearest names, for one that lm-eval does not know; ImportError without lm-eval."""
    if tasks in TASKS:
        if tasks != "none":
            _needed()
        return
    for name in names_of(tasks):
        if name in TASKS["mini"] or Path(name).suffix == ".yaml" and Path(name).is_file():
            continue
        known = manager(everything=True).all_tasks
        if name not in known:
            raise ValueError(f"tasks={tasks!r}: lm-eval has no task or group {name!r}; nearest: "
                             f"{nearest(name, known)}; allowed: official, mini, none, or names of lm-eval joined by "
                             f"commas")


def names_of(tasks: str) -> list[str]:
    """Return the names in a list of tasks."""
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise ValueError(f"tasks={tasks!r}; allowed: official, mini, none, or names of lm-eval joined by commas")
    return names


def task(name: str) -> Any:
    """Return the argument of lm-eval for a task: the name, or the completed config of one of our own tasks."""
    if not name.startswith("mini_"):
        return name
    with extra("eval"):
        import yaml

    config = yaml.safe_load((INPUTS / "mini" / f"{name}.yaml").read_text())
    file: Path = INPUTS / "mini" / f"{name.removeprefix('mini_')}.jsonl"
    return {**config, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}


@cache
def manager(*, everything: bool) -> Any:
    """Return the task index of lm-eval, built once; without its own 14,000 files unless ``everything``."""
    _needed()
    with extra("eval"):
        from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)


def correctness(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return kind of accuracy -> (N,) booleans, for every kind that the samples of a task have."""
    return {kind: np.array([s[kind] for s in samples], float) > 0.5 for kind in KINDS if kind in samples[0]}


def other_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a task that are no kind of accuracy, such as F1 or a perplexity."""
    found = {key.partition(",")[0]: value for key, value in result.items() if isinstance(value, float)}
    return {key: value for key, value in found.items() if key not in KINDS and not key.endswith("_stderr")}


def _needed() -> None:
    with extra("eval"):
        import lm_eval  # noqa: F401
