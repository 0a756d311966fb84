"""Index of runs: title, settings, readers and claims of every page that one row of runs.yml has made.

Order of this file: facts about rows · titles · table.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra
from pruning_lib.experiments.runs import Row, Tree, parameters_of, source

with extra("report"):
    import nbformat

FIRST = ("model", "network", "method", "criterion", "removed_fraction", "reconstruction", "heads_removed",
         "blocks_removed", "seed")  # the most telling parameters, in the order of a title
NAMES = ("method", "methods", "criterion", "criteria", "reconstruction")  # their values are keys of tables
SHORT = 24  # characters of a value that a title shows
WHERE_ZERO_COUNTS = ("removed_fraction", "heads_removed", "seed")  # elsewhere 0 means that something is switched off
SETTINGS = 4  # parameters in a title
CLAIM = re.compile(r"^\| ([^|]+) \| [^|]+ \| \{glue:text\}`\.\./executed/(\w+)\.ipynb::\w+_verdict:s` \|$", re.M)
COLUMNS = ("run", "experiment", "model", "method", "removed", "read by", "claim")


def parameters(rows: Iterable[Row], tree: Tree) -> dict[str, dict[str, Any]]:
    """Return row name -> all parameters, with the defaults of its notebook."""
    known: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.notebook not in known:
            known[row.notebook] = dict(parameters_of(source(row, tree)))
    return {row.name: {**known[row.notebook], **row.parameters} for row in rows}


def varying(rows: Iterable[Row], given: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return notebook -> parameters with more than one value among its rows, the most telling ones first."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for key, value in given[row.name].items():
            found.setdefault(row.notebook, {}).setdefault(key, set()).add(repr(value))
    order = {key: place for place, key in enumerate(FIRST)}
    return {notebook: sorted((key for key, seen in values.items() if len(seen) > 1),
                             key=lambda key: order.get(key, len(order))) for notebook, values in found.items()}


def readers(rows: Iterable[Row], tree: Tree) -> dict[str, list[str]]:
    """Return notebook or row -> readings whose code names it in a text."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.reading:
            cells = nbformat.read(source(row, tree), as_version=4).cells
            code = ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
            texts = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
            for text in texts:
                if isinstance(text, str):
                    found.setdefault(text, []).append(row.name)
    return found


def claims(chapter: Path) -> dict[str, list[str]]:
    """Return reading -> claims of the page of claims whose verdict it computes."""
    found: dict[str, list[str]] = {}
    for claim, reading in CLAIM.findall(chapter.read_text() if chapter.is_file() else ""):
        found.setdefault(reading, []).append(claim)
    return found


def experiments(rows: Iterable[Row], tree: Tree) -> dict[str, str]:
    """Return notebook -> text of its first heading."""
    found: dict[str, str] = {}
    for row in rows:
        if row.notebook not in found:
            first = nbformat.read(source(row, tree), as_version=4).cells[0].source
            found[row.notebook] = first.splitlines()[0].lstrip("# ")
    return found


# --- titles -----------------------------------------------------------------------------------------------------------


def setting(key: str, value: Any) -> str:
    """Return a parameter in words, with a fraction in per cent."""
    words = key.replace("_", " ")
    if key.endswith("_fraction"):
        return f"{100 * float(value):g} % {words.removesuffix(' fraction')}".rstrip()
    if key == "heads_removed" and value == "same_share":
        return "same share of heads"
    return f"{words} {str(value).replace('_', ' ') if key in NAMES else value}"


def settings(given: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the named parameters in words, without those that are switched off or too long to read."""
    return [setting(key, given[key]) for key in names
            if given.get(key) not in ("none", "", None) and len(str(given[key])) <= SHORT
            and (given[key] != 0 or key in WHERE_ZERO_COUNTS)]


def titles(rows: Iterable[Row], tree: Tree) -> dict[str, str]:
    """Return row name -> title of its page: the row, the experiment and the settings that vary between its rows."""
    rows = list(rows)
    given = parameters(rows, tree)
    names, experiment = varying(rows, given), experiments(rows, tree)
    found = {}
    for row in rows:
        said = ", ".join(settings(given[row.name], names[row.notebook])[:SETTINGS])
        found[row.name] = f"{row.name}: {experiment[row.notebook]}" + (f" ({said})" if said else "")
    return found


# --- table ------------------------------------------------------------------------------------------------------------


def model_of(given: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the model of a run; a run that examines networks of other runs has the model of the first one."""
    for key in ("model", "network", "language_model"):
        if given.get(key) not in (None, "none"):
            return str(given[key])
    first = str(given.get("runs", "")).split(" ")[0]
    if first in others:
        return model_of(others[first], {})
    return "networks of the authors" if given.get("networks") else ""


def method_of(given: Mapping[str, Any]) -> str:
    """Return method and criterion of a run, without those that are switched off."""
    named = [str(given[key]) for key in ("method", "methods", "criterion", "criteria") if key in given]
    return " + ".join(dict.fromkeys(name.replace("_", " ") for name in named if name != "none")) or (
        "none" if named else "")


def table(runs: Sequence[Row], rows: Sequence[Row], tree: Tree, chapter: Path) -> str:
    """Return a table in Markdown with one line per run.

    Parameters
    ----------
    runs : rows with a page
    rows : all rows; the code of the readings among them names the runs that they read
    chapter : the page of claims, which quotes verdicts of readings
    """
    given, read_by, judged = parameters([*rows, *runs], tree), readers(rows, tree), claims(chapter)
    names, experiment = varying(runs, given), experiments(runs, tree)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in runs:
        found, reading = given[row.name], list(dict.fromkeys([*read_by.get(row.notebook, []),
                                                              *read_by.get(row.name, [])]))
        said = ", ".join(settings(found, [key for key in names[row.notebook] if key not in FIRST[:5]]))
        removed = setting("_fraction", found["removed_fraction"]) if "removed_fraction" in found else ""
        cells = (f"{_link(row.name)} {said}", experiment[row.notebook], model_of(found, given),
                 method_of(found), removed,
                 ", ".join(map(_link, reading)), "; ".join(c for name in reading for c in judged.get(name, [])))
        lines.append("| " + " | ".join(cell.strip().replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def waiting(rows: Iterable[Row], tree: Tree) -> str:
    """Return a table in Markdown of the rows that were not run: name, model, and needs of the row."""
    rows = [row for row in rows if row.not_run]
    given = parameters(rows, tree)
    lines = [f"| `{row.name}` | {model_of(given[row.name], given)} | {row.not_run} |" for row in rows]
    return "\n".join(["| row | model | what it needs |", "| --- | --- | --- |", *lines]) + "\n"


def _link(name: str) -> str:
    return f"[{name}](../executed/{name}.ipynb)"
