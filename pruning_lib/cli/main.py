"""Command-line interface ``pruning-lib``: run, status and book, and the commands of ``model_commands``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pruning_lib import __version__, _locks
from pruning_lib.cli import model_commands
from pruning_lib.experiments import execution, local, runs, staleness
from pruning_lib.experiments.runs import Row, Tree
from pruning_lib.experiments.staleness import MADE_BEFORE
from pruning_lib.report import book


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # show progress at once in a pipe or a log too
    arguments = _parser().parse_args(argv)
    try:
        return arguments.act(arguments)
    except BrokenPipeError:  # the reader closed the pipe, as in: pruning-lib status | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports the error again on exit
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pruning-lib", description="Run the experiments of the pruning book.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute rows of notebooks/runs.yml", description=(
        "Execute rows of notebooks/runs.yml with papermill. The page and record of a row appear "
        "when the row is complete."))
    run.add_argument("rows", nargs="*", metavar="ROW", help="names of rows")
    run.add_argument("--all", action="store_true", help="every row of runs.yml except rows marked not_run")
    run.add_argument("--defaults", action="store_true", help="every notebook once, at its default parameters")
    run.add_argument("--stale", action="store_true", help="skip rows with an up-to-date page")
    run.add_argument("--stale-code", action="store_true", help="like --stale, and also run rows whose page predates "
                     "code fingerprints, so that code changes cannot be detected")
    run.add_argument("-j", "--jobs", type=_count, default=1, metavar="N", help=(
        "rows to run in parallel, each in its own process; 0: one per core (default: 1). Limited by memory"))
    run.add_argument("--memory", type=float, default=0, metavar="GB",
                     help="memory for all rows together (default: free memory)")
    run.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="Dask scheduler for the rows, one task per row")
    run.add_argument("--retries", type=_count, default=1, metavar="N",
                     help="attempts to repeat a row after its process died (default: 1)")
    run.add_argument("-p", dest="overrides", action="append", default=[], metavar="NAME=VALUE",
                     help="override a parameter; the page goes to --out instead of the published pages")
    _places(run)
    run.set_defaults(act=_run)

    status = commands.add_parser("status", help="list the rows that have to run again, with the reason")
    _places(status)
    status.set_defaults(act=_status)

    model_commands.register(commands)
    book = commands.add_parser("book", help="render the report, or the pages under --out, as HTML")
    _places(book)
    book.set_defaults(act=_book)
    return parser


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: current folder)")
    parser.add_argument("--out", type=Path, help="folder for pages and records instead of the published ones")


def _run(arguments: argparse.Namespace) -> int:
    overrides = dict(_override(text) for text in arguments.overrides)
    out = arguments.out or (arguments.root / "build" / "own" if overrides else None)
    tree = Tree.at(arguments.root, out)
    chosen = sorted(_chosen(arguments, tree, overrides), key=lambda row: row.reading)  # readings need the records
    failed = _all(chosen, tree, arguments)
    if failed:
        print(f"{len(failed)} row(s) failed")
    return 1 if failed else 0


def _all(rows: list[Row], tree: Tree, arguments: argparse.Namespace) -> list[str]:
    """Run rows on this machine or a cluster as requested, and return the names of failed rows."""
    def up_to_date(row: Row) -> bool:
        return (arguments.stale or arguments.stale_code) and not _why(row, tree, arguments.stale_code)

    if arguments.scheduler:
        from pruning_lib.experiments import dask_cluster  # Dask takes a second to load

        return dask_cluster.run(rows, tree, arguments.scheduler, retries=arguments.retries, up_to_date=up_to_date)
    if arguments.jobs == 1 and not any(row.memory_gb or row.resources for row in rows):
        return [row.name for row in rows if not _one(row, tree, up_to_date)]
    machine = local.Machine.here(arguments.jobs, arguments.memory)
    return local.run(rows, tree, machine, retries=arguments.retries, up_to_date=up_to_date)


def _one(row: Row, tree: Tree, up_to_date: Callable[[Row], bool]) -> bool:
    """Run one row in this process and return True on success."""
    if up_to_date(row):
        print(f"{row.name}: up to date")
        return True
    try:
        execution.run(row, tree)
    except execution.RowFailed as error:
        print(error)
        return False
    except OSError as error:
        print(f"row {row.name} failed: {error}; published pages and records are as they were")
        return False
    return True


def _why(row: Row, tree: Tree, code_too: bool = False) -> str:
    """Return the reason for running a row again; empty if up to date."""
    found = staleness.staleness_of(row, tree)
    return found.why or (MADE_BEFORE if code_too and not found.code_known else "")


def _chosen(arguments: argparse.Namespace, tree: Tree, overrides: dict[str, Any]) -> list[Row]:
    if bool(arguments.rows) + arguments.all + arguments.defaults != 1:
        raise SystemExit("give either names of rows, or --all, or --defaults")
    table = runs.defaults(tree) if arguments.defaults else runs.rows(tree)
    if not (arguments.all or arguments.defaults):
        at_defaults = runs.defaults(tree)
        table = {**at_defaults, **table}
        unknown = [name for name in arguments.rows if name not in table]
        if unknown:
            raise SystemExit(f"no row {', '.join(unknown)}; rows: {', '.join(table)}")
        table = {name: table[name] for name in arguments.rows}
    else:
        for row in table.values():
            if row.not_run:
                print(f"{row.name}: left out ({row.not_run}); to run it, give its name")
        table = {name: row for name, row in table.items() if not row.not_run}
    chosen = [replace(row, parameters={**row.parameters, **overrides}) for row in table.values()]
    return [runs.checked(row, tree) for row in chosen]


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"-p {text}: give NAME=VALUE")
    try:
        return name, yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise SystemExit(f"-p {text}: the value is not valid YAML; put quotes inside those of the shell around text "
                         f"with special characters: -p \"{name}='...'\"") from None


def _status(arguments: argparse.Namespace) -> int:
    tree = Tree.at(arguments.root, arguments.out)
    unknown = []
    for name, row in runs.rows(tree).items():
        if row.not_run and not tree.page(row).exists():
            print(f"{name:30} not run here: {row.not_run}")
            continue
        found = staleness.staleness_of(row, tree)
        running = _locks.held(tree.lock(row))
        print(f"{name:30} {found.why or 'up to date'}" + (f"; running: {running}" if running else ""))
        unknown += [] if found.code_known or found.why else [name]
    if unknown:
        print(f"{MADE_BEFORE}: {', '.join(unknown)}. To run them again: pruning-lib run --all --stale-code",
              file=sys.stderr)
    return 0


def _book(arguments: argparse.Namespace) -> int:
    print(book.build_book(arguments.root, arguments.out))
    return 0
