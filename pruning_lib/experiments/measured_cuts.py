"""Cuts of one language model, each measured once: an interrupted run goes on where it stopped.

A comparison of scores over calibration draws needs dozens of cuts.  The scores of a draw serve every removed fraction,
and the losses of a cut are kept under a key of everything they depend on but the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruning_lib.data.batching import batches
from pruning_lib.data.text import fingerprint
from pruning_lib.evaluation import quality
from pruning_lib.experiments.computed_once import computed_once, json_once
from pruning_lib.models import surgery
from pruning_lib.pruning import importance
from pruning_lib.pruning.importance import METHODS
from pruning_lib.pruning.reconstruction import reconstruct
from pruning_lib.pruning.selection import Importance, choose


@dataclass(frozen=True)
class Setting:
    """The model that is cut and the text on which cuts are measured.

    Attributes
    ----------
    name : of the model, as ``loading.load_model`` takes it; part of the key
    text : test texts
    tokens, window : as in ``quality.perplexity``; windows do not overlap
    """

    name: str
    network: nn.Module
    tokenizer: Any
    text: Sequence[str]
    tokens: int
    window: int

    @property
    def key(self) -> dict[str, Any]:
        """Return everything that a measurement depends on besides the cut."""
        dtype = str(next(self.network.parameters()).dtype)
        return {"model": self.name, "dtype": dtype, "text": fingerprint(self.text), "tokens": self.tokens,
                "window": self.window, "torch": torch.__version__}


def dense(setting: Setting) -> dict[str, Any]:
    """Return the perplexity of the model before any cut, as ``quality.perplexity`` does."""
    return json_once("cuts", {**setting.key, "method": "dense"}, lambda: _perplexity(setting, setting.network))


def cut(setting: Setting, method: str, *, removed_fraction: float, heads_removed: int = 0,
        prompts: Sequence[str] = (), seed: int = 0, reconstruction: str = "none", solved_on: Sequence[str] = ()
        ) -> dict[str, Any]:
    """Return the perplexity after one cut, and ``removed_fraction``, the one it reaches.

    Parameters
    ----------
    method : key of ``importance.METHODS``
    prompts : one calibration draw, for methods that look at data
    seed : for the rule ``"random"``
    reconstruction : ``"none"``, or a mode of ``reconstruction.reconstruct``
    solved_on : texts for the reconstruction
    """
    def make() -> dict[str, Any]:
        plan = choose(scores(setting, method, prompts), setting.network, removed_fraction=removed_fraction,
                      heads_removed=heads_removed, rule=METHODS[method].rule, multiple_of=1, seed=seed)
        smaller = (surgery.remove(setting.network, plan) if reconstruction == "none" else
                   reconstruct(setting.network, plan, batches(solved_on, setting.tokenizer), mode=reconstruction)[0])
        return {**_perplexity(setting, smaller), "removed_fraction": plan.removed_fraction}

    # plain cuts keep the key that they had before there was a reconstruction
    solved = {"reconstruction": reconstruction, "solved_on": fingerprint(solved_on)}
    repaired = {} if reconstruction == "none" else solved
    return json_once("cuts", {**setting.key, "method": method, "removed_fraction": removed_fraction, "seed": seed,
                              "heads_removed": heads_removed, "prompts": fingerprint(prompts), **repaired}, make)


def scores(setting: Setting, method: str, prompts: Sequence[str]) -> Importance:
    """Return the importance that ``method`` measures on one draw of prompts, from the cache where it is kept."""
    measure = METHODS[method].importance
    if measure is importance.uniform:
        return measure(setting.network, ())
    settings = {"model": setting.name, "dtype": setting.key["dtype"], "method": method,
                "prompts": fingerprint(prompts), "torch": torch.__version__}
    return computed_once("importances", settings, lambda path: measure(
        setting.network, batches(prompts, setting.tokenizer)).save(path), Importance.load, ending=".safetensors")


def _perplexity(setting: Setting, network: nn.Module) -> dict[str, Any]:
    return quality.perplexity(network, setting.tokenizer, setting.text, window=setting.window, stride=setting.window,
                              max_tokens=setting.tokens or None, progress=False)

