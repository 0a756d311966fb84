"""Texts by name, from a file, or from the hub, in a fixed order.

A data set of the table is searched first in the folder ``PRUNING_DATA`` (one subfolder per set, parquet files as on the
hub), then on the hub.  The ``mini_`` sets are our own, small, and part of the repository.  Any other name is a file or
a data set on the hub, written as in ``sources``.
Calibration data, fine-tuning data and test data are three different sets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pruning_lib._extras import extra
from pruning_lib._files import digest, tree
from pruning_lib._registry import Table, nearest
from pruning_lib.data import sources
from pruning_lib.data.sources import Record, Source

INPUTS = tree() / "data" / "inputs"


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


TEXT_COLUMNS = ("text", "prompt", "content", "page")  # looked for in this order where a source names no column
ANSWERED = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))  # columns of prompts and answers

DATASETS: Table = Table("data set")
DATASETS["alpaca"] = Dataset(instruction_prompt, "alpaca-en-999", ("yahma/alpaca-cleaned",), licence="CC BY-NC 4.0")
DATASETS["c4"] = Dataset(_plain, "c4-300", ("allenai/c4", "en"), licence="ODC-BY")
DATASETS["wikitext2"] = Dataset(_plain, "wikitext-2-v1-pages", ("Salesforce/wikitext", "wikitext-2-v1"),
                                splits=("validation", "test"), licence="CC BY-SA 3.0", lines=True)
DATASETS["mini_prompts"] = Dataset(instruction_prompt, ours="mini_prompts.jsonl")
DATASETS["mini_calibration_text"] = Dataset(_plain, ours="mini_calibration_text.jsonl")
DATASETS["mini_text"] = Dataset(_plain, ours="mini_text.jsonl", splits=("test",))
# default -> set of this package that takes its place where the extra "eval" is not installed
STAND_INS = {"alpaca": "mini_prompts", "wikitext2": "mini_text"}


def texts(name: str | Path, n: int | None = None, *, split: str | None = None, seed: int | None = None,
          at_most: int | None = None) -> list[str]:
    """Return the first ``n`` texts of a data set (all by default), or ``n`` drawn with ``seed``.

    Parameters
    ----------
    name : key of ``DATASETS``, or a file or data set on the hub as ``sources`` writes it: ``"mine.jsonl"``,
        ``"mine.jsonl:question"``, ``"org/name@validation:text"``.  Without a column the texts are taken from ``text``,
        from Alpaca's three columns, or from the only column of texts
    split : part of the data set; by default the first of the table's, on the hub ``"train"``
    at_most : without ``n``, the first so many, or all where there are fewer

    Raises
    ------
    ValueError
        for an unknown name or split, a file that is damaged, a column that cannot be guessed, too large an ``n``.
    ConnectionError
        when the data set is not on disk and the hub cannot be reached.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> len(pl.texts("mini_prompts", 4))
    4
    """
    wanted = None if seed is not None else at_most if n is None else n
    found = (_table_texts(str(name), split, wanted) if str(name) in DATASETS
             else _own_texts(_source(name), split, wanted))
    n = min(len(found), at_most or len(found)) if n is None else n
    if not 0 < n <= len(found):
        raise ValueError(f"n={n} texts of {str(name)!r}; give 1 to {len(found)}")
    if seed is None:
        return found[:n]
    import torch  # torch's generator drew the texts of the published runs

    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:n].tolist()]


def calibration_texts(name: str | Path, n: int | None = None, *, at_most: int | None = None,
                      allow_test_text: bool = False) -> list[str]:
    """Return the first ``n`` texts of a data set that is not for testing; ``at_most`` as in ``texts``.

    Raises
    ------
    ValueError
        for test text, unless ``allow_test_text``; otherwise as ``texts``.
    """
    if not allow_test_text and is_test_text(name):
        train = ", ".join(key for key, entry in DATASETS.items() if entry.splits[0] != "test")
        raise ValueError(f"{str(name)!r} is test text: a model calibrated on it cannot be measured on it. Take another "
                         f"one ({train}, or a file), or say allow_test_text=True")
    return texts(name, n, at_most=at_most)


def default_name(name: str) -> str:
    """Return ``name``, or the small set of this package that stands in for it without the packages of ``eval``.

    Defaults then work with the core alone; a name that the user gives is never replaced.

    Examples
    --------
    >>> from pruning_lib import data
    >>> data.default_name("mini_prompts")
    'mini_prompts'
    """
    reader = "pyarrow" if _local(DATASETS[name]) else "datasets"
    return name if DATASETS[name].ours or find_spec(reader) else STAND_INS[name]


def same_place(first: str | Path, second: str | Path) -> bool:
    """Return whether two names are of the same data set or file, whatever columns and split they name."""
    def place(name: str) -> str:
        return name if name in DATASETS else str(Path(_source(name).place).absolute())

    return place(str(first)) == place(str(second))


def is_test_text(name: str | Path) -> bool:
    """Return whether the texts that ``texts(name)`` gives are a test split."""
    if str(name) in DATASETS:
        return DATASETS[str(name)].splits[0] == "test"
    return _source(name).split.startswith("test")


def pairs(name: str | Path, n: int | None = None, *, skip: int = 50) -> list[tuple[str, str]]:
    """Return instructions and their answers for fine-tuning, without the calibration prompts.

    Parameters
    ----------
    name : as in ``texts``; a source of your own has Alpaca's columns, one of the pairs in ``ANSWERED``, or names two
        columns: ``"mine.jsonl:question,reply"``
    n : number of pairs, from the first one after ``skip``; None for all
    skip : number of calibration prompts at the beginning; later rows with the same prompts are left out too

    Raises
    ------
    ValueError
        for a data set without answers, or an ``n`` larger than the number of pairs.
    """
    rows = [(prompt, answer) for prompt, answer in _all_pairs(name) if prompt.strip()]
    calibration = {prompt for prompt, _ in rows[:skip]}
    found = [(prompt, answer) for prompt, answer in rows[skip:] if prompt not in calibration and answer.strip()]
    if not found:
        raise ValueError(f"{str(name)!r} has no pairs beyond the first {skip} prompts, which are for calibration; "
                         f"calibrate on fewer")
    n = len(found) if n is None else n
    if not 0 < n <= len(found):
        raise ValueError(f"n={n} pairs of {str(name)!r}; give 1 to {len(found)}, the number beyond the first {skip}")
    return found[:n]


def fingerprint(samples: Iterable[str]) -> str:
    """Return 16 hex digits of the SHA-256 of the samples; runs with the same fingerprint used the same data.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> pl.fingerprint(["a", "b"]) == pl.fingerprint(["b", "a"])
    False
    """
    return digest(sample.encode() + b"\0" for sample in samples)


def _table_texts(name: str, split: str | None, n: int | None) -> list[str]:
    entry: Dataset = DATASETS[name]
    split = split or entry.splits[0]
    if split not in entry.splits:
        others = ", ".join(key for key, other in DATASETS.items() if split in other.splits)
        raise ValueError(f"data set {name!r} has no split {split!r}; splits: {', '.join(entry.splits)}"
                         + f"; data sets with {split!r}: {others}" * bool(others))
    rows = _rows(name, entry, split, n if not entry.lines else None)
    found = [entry.text(row) for row in rows]
    if entry.lines and "page" not in rows[0]:  # the hub's form: one row per line
        found = articles(found)
    return [t for t in found if t.strip()]


def _source(name: str | Path) -> Source:
    """Return the source of a text that is not in the table; ValueError with the nearest names where there is none."""
    try:
        return sources.parse(name)
    except ValueError as error:
        if re.fullmatch(r"[\w.-]+", str(name)) and Path(str(name)).suffix.lower() not in sources.FILES:
            raise ValueError(f"unknown data set {str(name)!r}; known: {', '.join(sorted(DATASETS))} (nearest: "
                             f"{nearest(str(name), DATASETS)}); or give {sources.FORMS}") from None
        raise error


def _own_texts(source: Source, split: str | None, n: int | None) -> list[str]:
    if len(source.columns) > 1:
        raise ValueError(f"{source}: one column of texts is wanted, got {', '.join(source.columns)}")
    records = sources.read(source, split or "train", n)
    if source.columns:
        found = [sources.text_of(record, source.columns[0]) for record in records]
    elif "instruction" in records[0].row:
        found = [_instruction(record) for record in records]
    else:
        column = _text_column(source, records[0])
        found = [sources.text_of(record, column) for record in records]
    return [text for text in found if text.strip()]


def _text_column(source: Source, first: Record) -> str:
    """Return the column that holds the texts; ValueError where several could."""
    columns = [name for name, value in first.row.items() if isinstance(value, str)]
    column = next((name for name in TEXT_COLUMNS if name in columns), columns[0] if len(columns) == 1 else "")
    if not column:
        raise ValueError(f"{source} has the columns {', '.join(map(str, first.row))}; name the one with the texts: "
                         f"{source}:COLUMN")
    return column


def _instruction(record: Record) -> str:
    row = {name: sources.text_of(record, name) for name in ("instruction", "input") if name in record.row}
    if "instruction" not in row:
        raise ValueError(f"{record.where} has no column 'instruction'; it has: {', '.join(map(str, record.row))}")
    return instruction_prompt(row)


def _all_pairs(name: str | Path) -> list[tuple[str, str]]:
    """Return prompt and answer of every row."""
    if str(name) in DATASETS:
        entry: Dataset = DATASETS[str(name)]
        if entry.text is not instruction_prompt:
            known = ", ".join(k for k, v in DATASETS.items() if v.text is instruction_prompt)
            raise ValueError(f"data set {str(name)!r} has no answers; data sets with answers: {known}")
        return [(entry.text(row), row["output"]) for row in _rows(str(name), entry, entry.splits[0], None)]
    source = _source(name)
    records = sources.read(source, "train")
    if not source.columns and "instruction" in records[0].row:
        return [(_instruction(record), sources.text_of(record, "output")) for record in records]
    columns: Sequence[str] = source.columns or next((c for c in ANSWERED if set(c) <= set(records[0].row)), ())
    if len(columns) != 2:
        raise ValueError(f"{source} has the columns {', '.join(map(str, records[0].row))}; name the two with prompts "
                         f"and answers: {source}:PROMPTS,ANSWERS")
    return [(sources.text_of(record, columns[0]), sources.text_of(record, columns[1])) for record in records]


def _rows(name: str, entry: Dataset, split: str, n: int | None) -> list[dict]:
    """Return the rows of a data set of the table, nulls as empty texts."""
    return [{key: sources.plain(value) for key, value in row.items()} for row in _raw_rows(name, entry, split, n)]


def _local(entry: Dataset) -> Path | None:
    """Return the folder of a local copy under ``PRUNING_DATA``; None without one."""
    folder = Path(os.environ.get("PRUNING_DATA", "")) / entry.folder / "data"
    return folder if os.environ.get("PRUNING_DATA") and folder.is_dir() else None


def _raw_rows(name: str, entry: Dataset, split: str, n: int | None) -> list[dict]:
    if entry.ours:
        return [record.row for record in sources.json_lines(INPUTS / entry.ours)]
    if local := _local(entry):
        files = sorted(local.glob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(f"{local} has no {split}-*.parquet")
        return [row for file in files for row in sources.parquet_rows(file)]
    ours = ", ".join(k for k, v in DATASETS.items() if v.ours)
    with extra("eval", f"; without it, instead of {name!r}: a file of yours, or {ours}, which are part of the package"):
        from datasets import load_dataset

    try:
        stream = load_dataset(*entry.hub, split=split, streaming=n is not None)
        return list(stream.take(n) if n is not None else stream)
    except Exception as error:  # datasets raises many types when the hub is unreachable
        raise ConnectionError(
            f"data set {name!r} is not available: {error}\nSet PRUNING_DATA to a folder with {entry.folder!r}, "
            f"go online, or use one of the sets that come with the repository: {ours}"
        ) from error
