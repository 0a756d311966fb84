"""Structured pruning: make a trained network smaller, measure the cost, and load the result anywhere.

Prune a language model (AMP [1]_ or another method) and save it as a plain checkpoint::

    import pruning_lib as pl

    model, tokenizer = pl.load_model("smollm2-135m-instruct")       # or a local folder, or a hub name
    result = pl.prune(model, tokenizer, removed_fraction=0.2,       # of all parameters
                      calibration="mini_prompts")                   # or a file, a list of texts, batches
    pl.save(result.model, tokenizer, "smaller")                     # loads with plain transformers

Remove residual blocks of an image network (Consensus [2]_ or another criterion)::

    network, _ = pl.load_model("resnet50")
    result = pl.prune_blocks(network, images, labels, blocks_removed=2)
    pl.save(result.model, None, "shallower")

Step by step, a language model goes through ``importance``, ``choose``, and ``remove`` or ``reconstruct``; ``tune``
recovers quality, ``perplexity``, ``zero_shot`` and ``accuracy`` measure it, ``compare`` gives a difference its
interval.  The folders of the package follow the same order: models, data, pruning, training, evaluation, experiments
(re-running the book's notebooks), report (``plots``) and cli.

Letters for shapes, in the code and in the book: ``B`` batch, ``T`` tokens, ``C`` width of the residual stream, ``H``
query heads of a block, ``G`` key/value groups of a block, ``D`` width of a head, ``M`` MLP neurons of a block, ``L``
blocks, ``N`` samples, ``P`` features.

References
----------
.. [1] Mugnaini et al., "Efficient LLMs with AMP: Attention Heads and MLP Pruning", 2025, arXiv 2504.21174.
.. [2] Mugnaini et al., "Layer Pruning with Consensus: A Triple-Win Solution", 2024, arXiv 2411.14345.
"""

from __future__ import annotations

import time as _time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning_lib.data.batching import batches as batches
    from pruning_lib.data.text import fingerprint as fingerprint
    from pruning_lib.data.text import texts as texts
    from pruning_lib.evaluation.quality import accuracy as accuracy
    from pruning_lib.evaluation.quality import paired as compare
    from pruning_lib.evaluation.quality import perplexity as perplexity
    from pruning_lib.evaluation.quality import zero_shot as zero_shot
    from pruning_lib.experiments.records import read as read_record
    from pruning_lib.experiments.records import to_dataframe as records
    from pruning_lib.experiments.records import write as record
    from pruning_lib.models.checkpoints import save as save
    from pruning_lib.models.families import sizes as sizes
    from pruning_lib.models.loading import load_model as load_model
    from pruning_lib.models.surgery import remove as remove
    from pruning_lib.pruning.block_ranking import prune_blocks as prune_blocks
    from pruning_lib.pruning.block_ranking import rank_blocks as rank_blocks
    from pruning_lib.pruning.importance import importance as importance
    from pruning_lib.pruning.pipeline import prune as prune
    from pruning_lib.pruning.reconstruction import reconstruct as reconstruct
    from pruning_lib.pruning.selection import choose as choose
    from pruning_lib.report import plots as plots
    from pruning_lib.training.lora import tune as tune

__version__ = "0.2.0"
_started = _time.monotonic()  # a record says how long its run took; a notebook imports this package first

# public name -> module and name there, in the order of the work; loaded when first used
_PUBLIC = {
    "load_model": "models.loading.load_model",
    "texts": "data.text.texts",
    "fingerprint": "data.text.fingerprint",
    "batches": "data.batching.batches",
    "sizes": "models.families.sizes",
    "importance": "pruning.importance.importance",
    "choose": "pruning.selection.choose",
    "remove": "models.surgery.remove",
    "reconstruct": "pruning.reconstruction.reconstruct",
    "prune": "pruning.pipeline.prune",
    "rank_blocks": "pruning.block_ranking.rank_blocks",
    "prune_blocks": "pruning.block_ranking.prune_blocks",
    "tune": "training.lora.tune",
    "perplexity": "evaluation.quality.perplexity",
    "zero_shot": "evaluation.quality.zero_shot",
    "accuracy": "evaluation.quality.accuracy",
    "compare": "evaluation.quality.paired",
    "save": "models.checkpoints.save",
    "record": "experiments.records.write",
    "read_record": "experiments.records.read",
    "records": "experiments.records.to_dataframe",
    "plots": "report.plots",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Load a public name, or a module under the name it had in version 0.1."""
    if name in _PUBLIC:
        globals()[name] = _loaded(_PUBLIC[name])
        return globals()[name]
    if not name.startswith("_"):
        from pruning_lib._renamed import old_module

        return old_module(name)
    raise AttributeError(f"module 'pruning_lib' has no attribute {name!r}")


def _loaded(place: str) -> Any:
    """Return the object at ``place``; a module without the packages of its extra raises when it is first used."""
    from pruning_lib._extras import Lazy, MissingExtra

    module, _, attribute = place.rpartition(".")
    found = getattr(import_module(f"pruning_lib.{module}"), attribute, None)
    if found is not None:
        return found
    try:
        return import_module(f"pruning_lib.{place}")
    except MissingExtra:  # help(pruning_lib) shows the other names
        return Lazy(f"pruning_lib.{place}", "report")


def __dir__() -> list[str]:
    return sorted(__all__)
