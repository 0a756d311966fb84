"""Data sets by name: texts and images, each in a fixed order."""

from pruning_lib.data.batching import batches
from pruning_lib.data.text import (
    DATASETS,
    INPUTS,
    Dataset,
    articles,
    fingerprint,
    instruction_prompt,
    pairs,
    texts,
)

__all__ = ["DATASETS", "INPUTS", "Dataset", "articles", "batches", "fingerprint", "instruction_prompt", "pairs",
           "texts"]
