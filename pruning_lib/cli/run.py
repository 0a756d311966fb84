"""The commands of the book: run, status, book."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pruning_lib import _locks
from pruning_lib._extras import extra
from pruning_lib._registry import nearest
from pruning_lib.cli.output import json_text
from pruning_lib.experiments import execution, local, runs, staleness
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.experiments.staleness import MADE_BEFORE
from pruning_lib.experiments.worker import Outcome
from pruning_lib.report import book as report
from pruning_lib.report import documents

with extra("report"):
    import yaml


def run(arguments: argparse.Namespace) -> int:
    """Run rows; return 1 if a row failed."""
    overrides = dict(_override(text) for text in arguments.overrides)
    out = arguments.out or (arguments.root / "build" / "own" if overrides or arguments.name else None)
    tree = Tree.at(arguments.root, out)
    chosen = sorted(_chosen(arguments, tree, overrides), key=lambda row: row.reading)  # readings need the records
    failed = _all(chosen, tree, arguments)
    if arguments.json:
        pages = {row.name: str(tree.page(row)) for row in chosen if row.name not in failed}
        print(json_text({"pages": pages, "failed": failed}))
    if failed:
        print(f"{len(failed)} row(s) failed", file=sys.stderr)
    return 1 if failed else 0


def _all(rows: list[Row], tree: Tree, arguments: argparse.Namespace) -> list[str]:
    """Run rows in the way that the arguments name; return the names of rows that failed."""
    def up_to_date(row: Row) -> bool:
        return (arguments.stale or arguments.stale_code) and not _why(row, tree, arguments.stale_code)

    log = _log(arguments)
    if arguments.scheduler:
        from pruning_lib.experiments import dask_cluster  # Dask takes a second to load

        return dask_cluster.run(rows, tree, arguments.scheduler, retries=arguments.retries, log=log, warn=_warn,
                                up_to_date=up_to_date)
    if arguments.jobs == 1 and not any(row.memory_gb or row.resources for row in rows):
        return _in_turn(rows, tree, up_to_date, log)
    machine = local.Machine.here(arguments.jobs, arguments.memory)
    return local.run(rows, tree, machine, retries=arguments.retries, log=log, warn=_warn, up_to_date=up_to_date)


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _log(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Return the function that prints progress: nothing when quiet, and not into the JSON."""
    if arguments.quiet:
        return lambda text: None
    return lambda text: print(text, file=sys.stderr if arguments.json else sys.stdout)


def _in_turn(rows: list[Row], tree: Tree, up_to_date: Callable[[Row], bool], log: Callable[[str], None]) -> list[str]:
    """Run rows in this process, one after the other; return the names of rows that failed."""
    progress = local.Progress(rows, tree, 1, log, _warn)
    for row in rows:
        started = time.monotonic()
        outcome = _one(row, tree, up_to_date, log)
        progress.finished(row, outcome, (time.monotonic() - started) / 60)
    return progress.failed


def _one(row: Row, tree: Tree, up_to_date: Callable[[Row], bool], log: Callable[[str], None]) -> Outcome:
    """Run one row in this process and return its outcome."""
    if up_to_date(row):
        return Outcome("done", "up to date")
    try:
        execution.run(row, tree, log=log)
    except execution.RowFailed as error:
        return Outcome("failed", str(error))
    except OSError as error:
        return Outcome("failed", f"row {row.name} failed: {error}; published pages and records are unchanged")
    return Outcome("done")


def _why(row: Row, tree: Tree, code_too: bool = False) -> str:
    """Return the reason for running a row again; empty if up to date."""
    found = staleness.staleness_of(row, tree)
    return found.why or (MADE_BEFORE if code_too and not found.code_known else "")


def _chosen(arguments: argparse.Namespace, tree: Tree, overrides: dict[str, str]) -> list[Row]:
    if bool(arguments.rows) + arguments.all + arguments.defaults != 1:
        raise SystemExit("give either names of rows, or --all, or --defaults")
    table = runs.defaults(tree) if arguments.defaults else runs.rows(tree)
    if not (arguments.all or arguments.defaults):
        table = {**runs.defaults(tree), **table}
        _refuse_unknown(arguments.rows, table)
        table = {name: table[name] for name in arguments.rows}
    else:
        for row in table.values():
            if row.not_run:
                _log(arguments)(f"{row.name}: skipped ({row.not_run}); to run it, give its name")
        table = {name: row for name, row in table.items() if not row.not_run}
    chosen = [runs.checked(_with(row, overrides, tree), tree) for row in table.values()]
    return _named(chosen, arguments.name) if arguments.name else chosen


def _named(rows: list[Row], name: str) -> list[Row]:
    """Return the one row under a name of the user's, so that several pages of one notebook stand side by side."""
    if len(rows) != 1 or rows[0].reading:
        raise SystemExit(f"--name {name} names the page of one run; {len(rows)} row(s) were given")
    if not re.fullmatch(runs.NAME, name):
        raise SystemExit(f"--name {name!r}: use letters, digits, dot, dash and underscore, 100 at most")
    return [replace(rows[0], name=name)]


def _refuse_unknown(names: list[str], table: dict[str, Row]) -> None:
    """Raise SystemExit, with the nearest names, for a row that does not exist."""
    unknown = [name for name in names if name not in table]
    if unknown:
        known = "; ".join(f"nearest to {name}: {nearest(name, table)}" for name in unknown)
        raise SystemExit(f"no row {', '.join(unknown)}; {known}; all rows: pruning-lib list rows")


def _with(row: Row, overrides: dict[str, str], tree: Tree) -> Row:
    """Return the row with other values for its parameters, each of the type that its notebook has."""
    notebook = runs.source(row, tree)
    known, words = (runs.parameters_of(notebook), runs.words_of(notebook)) if overrides else ({}, {})
    typed = {name: _typed(text, 0 if name in words else known.get(name)) for name, text in overrides.items()}
    return replace(row, parameters={**row.parameters, **typed})


def _override(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"-p {text}: give NAME=VALUE")
    return name, value


def _typed(text: str, default: Any) -> Any:
    """Return the value of a parameter whose default is ``default``: texts as typed, anything else as YAML reads it.

    Characters that YAML gives a meaning, such as ``#``, belong to a text; quotes around the whole text are removed.
    """
    if isinstance(default, str):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    try:
        if isinstance(default, float):
            return float(text)
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):  # the check of the row's parameters names the type
        return text


def status(arguments: argparse.Namespace) -> int:
    """Print for each row whether it has to run again, and why."""
    tree = Tree.at(arguments.root, arguments.out)
    states, unknown = {}, []
    for name, row in runs.rows(tree).items():
        if row.not_run and not tree.page(row).exists():
            states[name] = f"not run here: {row.not_run}"
        else:
            found = staleness.staleness_of(row, tree)
            running = _locks.held(tree.lock(row))
            states[name] = (found.why or "up to date") + (f"; running: {running}" if running else "")
            unknown += [] if found.code_known or found.why else [name]
        if not arguments.json:
            print(f"{name:30} {states[name]}")
    if arguments.json:
        print(json_text(states))
    if unknown and not arguments.quiet:
        print(f"{MADE_BEFORE}: {', '.join(unknown)}. To run them again: pruning-lib run --all --stale-code",
              file=sys.stderr)
    return 0


def book(arguments: argparse.Namespace) -> int:
    """Render the book, as PDF or EPUB too where asked for, or one page of it, and print the paths."""
    if arguments.page:
        made = {"index": report.build_page(arguments.root, arguments.page, arguments.out)}
    else:
        made = {"index": report.build_book(arguments.root, arguments.out)}
        for kind, write in (("pdf", documents.pdf), ("epub", documents.epub)):
            if path := getattr(arguments, kind):
                made[kind] = write(made["index"].parent, made["index"].parents[2] / "_toc.yml", path)
    print(json_text({kind: str(path) for kind, path in made.items()}) if arguments.json
          else "\n".join(map(str, made.values())))
    return 0
