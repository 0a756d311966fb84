"""The command ``list``: names that options take, with a word on each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pruning_lib.cli import options, output


def show(arguments: argparse.Namespace) -> int:
    """Print one table or all of them."""
    return output.answer(_list, arguments)


def entries(table: str) -> dict[str, str]:
    """Return name -> description of the entries of a table in ``options.TABLES``."""
    return {"methods": _methods, "criteria": _criteria, "texts": _texts, "models": _models, "tasks": _tasks,
            "rows": _rows}[table]()


def _list(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found = {table: entries(table) for table in ([arguments.table] if arguments.table else options.TABLES)}
    none = "  none here; a folder that pruning-lib init has laid out has some"
    lines = [line for table, names in found.items()
             for line in (f"{table}:", *([f"  {name:28} {about}".rstrip() for name, about in names.items()] or [none]))]
    return found, "\n".join(lines)


def _methods() -> dict[str, str]:
    from pruning_lib.pruning.importance import METHODS

    return {**{name: method.about for name, method in METHODS.items()}, "none": "removes blocks only"}


def _criteria() -> dict[str, str]:
    from pruning_lib.pruning.block_ranking import CRITERIA

    usable = {name: entry.about for name, entry in CRITERIA.items() if not entry.needs_labels}
    return {"none": "removes no blocks", **usable}


def _texts() -> dict[str, str]:
    from pruning_lib import data

    return {name: f"{', '.join(entry.splits)}; {entry.licence}; "
                  + ("comes with this package" if entry.ours else f"from the hub ({entry.hub[0]})")
            for name, entry in data.DATASETS.items()}


def _models() -> dict[str, str]:
    from pruning_lib.models.loading import MODELS

    return {name: entry.licence for name, entry in MODELS.items()}


def _tasks() -> dict[str, str]:
    from pruning_lib.evaluation.quality import TASKS

    return {name: ", ".join(tasks) for name, tasks in TASKS.items()}


def _rows() -> dict[str, str]:
    if not (Path.cwd() / "notebooks" / "runs.yml").is_file():
        return {}
    from pruning_lib.experiments import runs

    return {name: row.notebook for name, row in runs.rows(runs.Tree.at(Path.cwd())).items()}
