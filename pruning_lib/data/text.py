"""Texts by name, in a fixed order.

Each data set is searched first in the folder ``PRUNING_DATA`` (one subfolder per set, parquet files as on the hub),
then on the hub.  The ``mini_`` sets are our own, small, and part of the repository.
Calibration data, fine-tuning data and test data are three different sets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pruning_lib._files import digest
from pruning_lib._registry import Table

INPUTS = Path(__file__).resolve().parents[2] / "data" / "inputs"


@dataclass(frozen=True)
class Dataset:
    """Sources of a data set, and the function that turns a row into a text."""

    text: Callable[[dict], str]
    folder: str = ""  # under PRUNING_DATA
    hub: tuple[str, ...] = ()  # path, and config if there are several
    ours: str = ""  # file under data/inputs
    splits: tuple[str, ...] = ("train",)
    licence: str = "Apache-2.0"
    lines: bool = False  # the hub stores lines, which are joined into articles


def instruction_prompt(row: dict) -> str:
    """Return the prompt of an instruction row in the layout of Alpaca, without the answer."""
    layout = ("Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
              "request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n")
    given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    more = ", paired with an input that provides further context" if given else ""
    return layout.format(more=more, instruction=row["instruction"], given=given)


def _plain(row: dict) -> str:
    return row["text"] if "text" in row else row["page"]


def articles(lines: list[str]) -> list[str]:
    """Join the lines of WikiText as the hub stores it into articles; each starts at a heading of the first level."""
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r" = [^=].*[^=] = \n?", line)]
    return ["".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


DATASETS: Table = Table("data set")
DATASETS["alpaca"] = Dataset(instruction_prompt, "alpaca-en-999", ("yahma/alpaca-cleaned",), licence="CC BY-NC 4.0")
DATASETS["c4"] = Dataset(_plain, "c4-300", ("allenai/c4", "en"), licence="ODC-BY")
DATASETS["wikitext2"] = Dataset(_plain, "wikitext-2-v1-pages", ("Salesforce/wikitext", "wikitext-2-v1"),
                                splits=("validation", "test"), licence="CC BY-SA 3.0", lines=True)
DATASETS["mini_prompts"] = Dataset(instruction_prompt, ours="mini_prompts.jsonl")
DATASETS["mini_calibration_text"] = Dataset(_plain, ours="mini_calibration_text.jsonl")
DATASETS["mini_text"] = Dataset(_plain, ours="mini_text.jsonl", splits=("test",))


def texts(name: str, n: int | None = None, *, split: str | None = None, seed: int | None = None) -> list[str]:
    """Return the first ``n`` texts of a data set (all by default), or ``n`` texts drawn with ``seed``.

    Raises
    ------
    ValueError
        for an unknown name or split, or an ``n`` larger than the data set.
    ConnectionError
        when the data set is not on disk and the hub cannot be reached.
    """
    entry: Dataset = DATASETS[name]
    split = split or entry.splits[0]
    if split not in entry.splits:
        raise ValueError(f"data set {name!r} has no split {split!r}; splits: {', '.join(entry.splits)}")
    rows = _rows(name, entry, split, n if seed is None and not entry.lines else None)
    found = [entry.text(row) for row in rows]
    if entry.lines and "page" not in rows[0]:  # as on the hub: one row per line
        found = articles(found)
    found = [t for t in found if t.strip()]
    n = len(found) if n is None else n
    if not 0 < n <= len(found):
        raise ValueError(f"n={n} texts of {name!r}; give 1 to {len(found)}")
    if seed is None:
        return found[:n]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:n].tolist()]


def pairs(name: str, n: int | None = None, *, skip: int = 50) -> list[tuple[str, str]]:
    """Return instructions and their answers for fine-tuning, without the calibration prompts.

    Parameters
    ----------
    n : number of pairs, from the first one after ``skip``; None for all
    skip : number of calibration prompts at the beginning; later rows with the same prompts are left out too

    Raises
    ------
    ValueError
        for a data set without answers, or an ``n`` larger than the number of pairs.
    """
    entry: Dataset = DATASETS[name]
    if entry.text is not instruction_prompt:
        known = ", ".join(k for k, v in DATASETS.items() if v.text is instruction_prompt)
        raise ValueError(f"data set {name!r} has no answers; data sets with answers: {known}")
    rows = [row for row in _rows(name, entry, entry.splits[0], None) if entry.text(row).strip()]
    calibration = {entry.text(row) for row in rows[:skip]}
    found = [(entry.text(row), row["output"]) for row in rows[skip:]]
    found = [(prompt, answer) for prompt, answer in found if prompt not in calibration and answer.strip()]
    n = len(found) if n is None else n
    if not 0 < n <= len(found):
        raise ValueError(f"n={n} pairs of {name!r}; give 1 to {len(found)}, the number beyond the first {skip}")
    return found[:n]


def fingerprint(samples: Iterable[str]) -> str:
    """Return 16 hex digits of the SHA-256 of the samples; runs with the same fingerprint used the same data."""
    return digest(sample.encode() + b"\0" for sample in samples)


def _rows(name: str, entry: Dataset, split: str, n: int | None) -> list[dict]:
    if entry.ours:
        return [json.loads(line) for line in (INPUTS / entry.ours).read_text().splitlines()]
    local = Path(os.environ.get("PRUNING_DATA", "")) / entry.folder / "data"
    if os.environ.get("PRUNING_DATA") and local.is_dir():
        import pandas as pd

        if not list(local.glob(f"{split}-*.parquet")):
            raise ValueError(f"{local} has no {split}-*.parquet")
        return pd.concat(map(pd.read_parquet, sorted(local.glob(f"{split}-*.parquet")))).to_dict("records")
    from datasets import load_dataset

    try:
        stream = load_dataset(*entry.hub, split=split, streaming=n is not None)
        return list(stream.take(n) if n is not None else stream)
    except Exception as error:  # datasets raises many types when the hub is unreachable
        ours = ", ".join(k for k, v in DATASETS.items() if v.ours)
        raise ConnectionError(
            f"data set {name!r} is not available: {error}\nSet PRUNING_DATA to a folder with {entry.folder!r}, "
            f"go online, or use one of the sets that come with the repository: {ours}"
        ) from error
