"""Names of version 0.1 that README and book taught; each works for one release, with a warning."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

MODULES = {  # module of version 0.1 -> module today
    "amp": "pruning.amp", "baselines": "pruning.importance", "plans": "pruning.selection",
    "consensus": "pruning.consensus", "criteria": "pruning.block_ranking", "similarity": "pruning.similarity",
    "recipes": "pruning.pipeline", "compensate": "pruning.reconstruction", "block_plans": "models.block_plan",
    "surgery": "models.surgery", "checkpoints": "models.checkpoints", "families": "models.families",
    "networks": "models.image_networks", "recover": "training.lora", "finetune": "training.sgd",
    "images": "data.images", "evaluate": "evaluation.quality", "attacks": "evaluation.attacks",
    "corruptions": "evaluation.corruptions", "shortcuts": "evaluation.spurious_cues", "cost": "evaluation.cost",
    "results": "experiments.records", "practice": "pruning.selection",
}
NAMES = {  # name of version 0.1 -> place today
    "amp.batches": "data.batching.batches", "amp.choose": "pruning.selection.choose",
    "plans.Plan": "models.plan.Plan", "compensate.remove": "pruning.reconstruction.reconstruct",
    "families.of": "models.families.family_of", "recover.lora": "training.lora.tune",
    "attacks.answers": "evaluation.attacks.robust_correct", "shortcuts.plant": "evaluation.spurious_cues.inject_cue",
    "cost.parameters": "models.families.parameter_count", "results.gather": "experiments.records.to_dataframe",
    "consensus.free": "pruning.consensus.max_removable", "models.load": "models.loading.load_model",
}


class _Old:
    """Stand-in for a module of version 0.1."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, attribute: str) -> Any:
        old = f"{self.__name__}.{attribute}"
        module, _, name = NAMES.get(old, f"{MODULES.get(self.__name__, '')}.{attribute}").rpartition(".")
        found = getattr(import_module(f"pruning_lib.{module}"), name)
        _warn(f"pruning_lib.{old}", f"pruning_lib.{module}.{name}")
        return found


def old_module(name: str) -> _Old:
    """Return a stand-in for a module of version 0.1.

    Raises
    ------
    AttributeError
        for any other name, with the public ones.
    """
    if name not in MODULES:
        import pruning_lib

        raise AttributeError(f"module 'pruning_lib' has no attribute {name!r}; it has {', '.join(pruning_lib.__all__)}")
    return _Old(name)


def old_name(module: str, name: str) -> Any:
    """Return the object of the old name ``pruning_lib.module.name``; the module is a folder today."""
    if f"{module}.{name}" not in NAMES:
        raise AttributeError(f"module 'pruning_lib.{module}' has no attribute {name!r}")
    return getattr(_Old(module), name)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} since version 0.2; the old name goes in 0.3", DeprecationWarning, stacklevel=4)
