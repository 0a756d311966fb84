"""Data sets by name: texts and images, each in a fixed order."""

from pruning_lib.data.batching import batches
from pruning_lib.data.text import (
    DATASETS,
    INPUTS,
    Dataset,
    articles,
    calibration_texts,
    default_name,
    fingerprint,
    instruction_prompt,
    is_test_text,
    pairs,
    same_place,
    texts,
)

__all__ = ["DATASETS", "INPUTS", "Dataset", "articles", "batches", "calibration_texts", "default_name",
           "fingerprint", "instruction_prompt", "is_test_text", "pairs", "same_place", "texts"]
