"""The command ``pruning-lib``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pruning_lib import __version__, experiments, practice
from pruning_lib.experiments import Row, Tree


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return arguments.act(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pruning-lib", description="Run the experiments of the pruning book.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute rows of notebooks/runs.yml", description=(
        "Execute rows of notebooks/runs.yml with papermill. A row's page and record appear when it is done."))
    run.add_argument("rows", nargs="*", metavar="ROW", help="names of rows")
    run.add_argument("--all", action="store_true", help="every row of runs.yml")
    run.add_argument("--defaults", action="store_true", help="every notebook once, at its default parameters")
    run.add_argument("--stale", action="store_true", help="leave out rows whose pages are up to date")
    run.add_argument("-p", dest="overrides", action="append", default=[], metavar="NAME=VALUE",
                     help="another value for a parameter; the page goes under --out, not to the published ones")
    _places(run)
    run.set_defaults(act=_run)

    status = commands.add_parser("status", help="which rows have to run again, and why")
    _places(status)
    status.set_defaults(act=_status)

    practice.register(commands)
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
    failed = 0
    for row in _chosen(arguments, tree, overrides):
        if arguments.stale and not experiments.why_stale(row, tree):
            print(f"{row.name}: up to date")
            continue
        try:
            experiments.run(row, tree)
        except experiments.RowFailed as error:
            print(error)
            failed += 1
    if failed:
        print(f"{failed} row(s) failed")
    return 1 if failed else 0


def _chosen(arguments: argparse.Namespace, tree: Tree, overrides: dict[str, Any]) -> list[Row]:
    if bool(arguments.rows) + arguments.all + arguments.defaults != 1:
        raise SystemExit("give names of rows, or --all, or --defaults")
    table = experiments.defaults(tree) if arguments.defaults else experiments.rows(tree)
    if not (arguments.all or arguments.defaults):
        at_defaults = experiments.defaults(tree)
        table = {**at_defaults, **table}
        unknown = [name for name in arguments.rows if name not in table]
        if unknown:
            raise SystemExit(f"no row {', '.join(unknown)}; rows: {', '.join(table)}")
        table = {name: table[name] for name in arguments.rows}
    chosen = [replace(row, parameters={**row.parameters, **overrides}) for row in table.values()]
    return [experiments.checked(row, tree) for row in chosen]


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"-p {text}: wanted NAME=VALUE")
    try:
        return name, yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise SystemExit(f"-p {text}: the value is no YAML; a text with signs in it needs quotes inside the shell's: "
                         f"-p \"{name}='...'\"") from None


def _status(arguments: argparse.Namespace) -> int:
    tree = Tree.at(arguments.root, arguments.out)
    for name, row in experiments.rows(tree).items():
        print(f"{name:30} {experiments.why_stale(row, tree) or 'up to date'}")
    return 0


def _book(arguments: argparse.Namespace) -> int:
    print(experiments.build_book(arguments.root, arguments.out))
    return 0
