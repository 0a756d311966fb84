"""Texts of one's own: rows of a file, or of a data set on the hub.

A source is written ``PLACE[@SPLIT][:COLUMN[,COLUMN]]``.  ``PLACE`` is a file (``.jsonl``, ``.json``, ``.txt`` or
``.parquet``) or a data set on the hub, ``ORG/NAME`` or ``ORG/NAME/CONFIG``.  A split belongs to the hub only.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra

FILES = (".jsonl", ".json", ".txt", ".parquet")
HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
COLUMNS = re.compile(r"\w[\w .-]*(, ?\w[\w .-]*)*")
FORMS = ("a file (.jsonl, .json, .txt, .parquet; FILE:COLUMN names the column), or a data set on the hub "
         "(ORG/NAME[/CONFIG][@SPLIT][:COLUMN])")


@dataclass(frozen=True)
class Source:
    """A file or a data set on the hub, and the columns to read.

    Attributes
    ----------
    place : path of the file, or name on the hub
    config, split : of a data set on the hub; empty where the source names none
    columns : names of columns in the order they are needed; empty where they have to be guessed
    """

    place: str
    is_file: bool
    config: str = ""
    split: str = ""
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(filter(None, [self.place, self.config])) + f"@{self.split}" * bool(self.split)


@dataclass(frozen=True)
class Record:
    """One row and where it stands, for messages: ``"mine.jsonl, line 3"``."""

    where: str
    row: dict[str, Any]


def parse(text: str | Path) -> Source:
    """Return the source that ``text`` names.

    Raises
    ------
    ValueError
        for a file that does not exist or is of another kind, and for text that is neither a file nor a hub name.
    """
    text = str(text)
    place, columns = _without_columns(text)
    path = _path(place)
    if _is_file(path):
        if path.suffix.lower() not in FILES:
            raise ValueError(f"{place}: a file of texts is one of {', '.join(FILES)}")
        return Source(str(path), True, columns=columns)
    if path.suffix.lower() in FILES or place.startswith((".", "/", "~")):
        raise ValueError(f"{place} is no file; give {FORMS}")
    hub = HUB.fullmatch(place)
    if not hub:
        raise ValueError(f"{text!r} names no text; give {FORMS}")
    return Source(hub["name"], False, hub["config"] or "", hub["split"] or "", columns)


def _path(place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError:  # ~NAME of a user that does not exist
        return Path(place)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False


def _without_columns(text: str) -> tuple[str, tuple[str, ...]]:
    """Split ``PLACE:COLUMN,COLUMN``; a file whose own name has a colon keeps it."""
    place, colon, columns = text.rpartition(":")
    if not colon or _is_file(_path(text)) or not COLUMNS.fullmatch(columns):
        return text, ()
    return place, tuple(name.strip() for name in columns.split(","))


def read(source: Source, split: str, n: int | None = None) -> list[Record]:
    """Return the rows of a source, nulls and NaN as empty texts.

    Parameters
    ----------
    split : of a data set on the hub, where the source names none
    n : read at most so many rows from the hub; None for all

    Raises
    ------
    ValueError
        for a file that is damaged or empty, naming file and line.
    ConnectionError
        when the hub does not give the data set.
    """
    records = _from_file(Path(source.place)) if source.is_file else _from_hub(source, split, n)
    if not records:
        raise ValueError(f"{source} holds no rows")
    return [Record(r.where, {key: plain(value) for key, value in r.row.items()}) for r in records]


def plain(value: Any) -> Any:
    """Return a cell as it is, or "" where it is null or NaN."""
    return "" if value is None or isinstance(value, float) and math.isnan(value) else value


def text_of(record: Record, column: str) -> str:
    """Return the text of a column; ValueError, naming the row, where it holds something else."""
    if column not in record.row:
        raise ValueError(f"{record.where} has no column {column!r}; it has: {', '.join(map(str, record.row))}")
    value = record.row[column]
    if not isinstance(value, str):
        raise ValueError(f"{record.where}: column {column!r} holds {type(value).__name__}, not text")
    return value


def json_lines(path: Path) -> list[Record]:
    r"""Return the objects of a file with one JSON object (or text) per line.

    Lines end at ``"\n"`` only: JSON allows other separators, such as U+2028, inside its texts.  A byte order mark and
    blank lines are skipped.
    """
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [_record(f"{path}, line {number}", _json(line, f"{path}, line {number}"))
            for number, line in lines if line.strip()]


def _from_file(path: Path) -> list[Record]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return json_lines(path)
    if kind == ".txt":  # paragraphs; perplexity joins texts by blank lines again
        parts = re.split(r"\n[ \t]*\n\s*", _decoded(path).replace("\r\n", "\n"))
        return [Record(f"{path}, paragraph {i}", {"text": part}) for i, part in enumerate(parts, 1) if part.strip()]
    if kind == ".parquet":
        return [Record(f"{path}, row {i}", row) for i, row in enumerate(parquet_rows(path), 1)]
    found = _json(_decoded(path), str(path))
    if isinstance(found, dict):  # {"data": [...]}, as many exports have it
        found = next((value for value in found.values() if isinstance(value, list)), None)
    if not isinstance(found, list):
        raise ValueError(f"{path}: wanted a list of texts or of objects")
    return [_record(f"{path}, entry {i}", entry) for i, entry in enumerate(found, 1)]


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file; ValueError where it cannot be read."""
    with extra("eval"):
        from pyarrow import ArrowException, parquet
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file: {error}") from None


def _from_hub(source: Source, split: str, n: int | None) -> list[Record]:
    with extra("eval"):
        from datasets import load_dataset
    name, split = [part for part in (source.place, source.config) if part], source.split or split
    try:
        rows = load_dataset(*name, split=split, streaming=n is not None)
        rows = list(rows.take(n) if n is not None else rows)
    except Exception as error:  # datasets raises many kinds
        raise ConnectionError(f"the hub did not give {'/'.join(name)}, split {split!r}: {error}\nGive another split "
                              f"with @SPLIT, go online, or give a file, which needs no network") from error
    return [Record(f"{source}, row {i}", dict(row)) for i, row in enumerate(rows, 1)]


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from None


def _record(where: str, entry: Any) -> Record:
    if isinstance(entry, str):
        return Record(where, {"text": entry})
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: wanted an object or a text, got {type(entry).__name__}")
    return Record(where, entry)
