"""The command ``pruning-lib``: its parser, and the way from arguments to a function.

Functions of commands are imported when they run, so that help and completion load no heavy package.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruning_lib import __version__
from pruning_lib._extras import MissingExtra
from pruning_lib._registry import nearest
from pruning_lib.cli import options

EXIT = """exit status: 0 done · 1 refused or failed, the reason is on standard error · 2 wrong usage ·
130 interrupted (Ctrl-C) · 141 the reader of the output ended"""


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistyped choice or option with the nearest ones."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse options that are none before argparse asks for those that are missing because of them."""
        if args is not None and not self._subparsers:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            for word in itertools.takewhile(lambda word: word != "--", args):
                name = word.partition("=")[0]
                if name.startswith("--") and not any(option.startswith(name) for option in options):
                    self.error(f"unknown option {name}; nearest: {nearest(name, options)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if choices and str(value) not in choices:
            raise argparse.ArgumentError(action, f"unknown {value!r}; nearest: {nearest(str(value), choices)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Execute the command line; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # progress appears at once in pipes and logs too
    try:
        arguments = parser().parse_args(argv)
        if arguments.quiet:
            os.environ["TQDM_DISABLE"] = "1"
        module, function = arguments.act.split(":")
        return getattr(importlib.import_module(f"pruning_lib.cli.{module}"), function)(arguments)
    except MissingExtra as error:
        print(f"pruning-lib {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pruning-lib: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader ended early: pruning-lib status | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids a second error when Python exits
        return 128 + signal.SIGPIPE


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = Parser(prog="pruning-lib", epilog=EXIT,
                 description="Prune a model of yours, measure it, or run the experiments of the pruning book.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    options.add_model_commands(commands)
    _add_run(commands)
    start = options.command(commands, "init", "init:init", "lay out notebooks, records and the book in a new folder")
    start.add_argument("folder", type=Path, help="must not exist yet, or be empty")
    status = options.command(commands, "status", "run:status", "list the rows that have to run again, and why")
    _add_places(status)
    book = options.command(commands, "book", "run:book", "render the report, or the pages under --out, as HTML")
    book.add_argument("--page", metavar="ROW", help="render the page of this row alone, in seconds")
    _add_places(book)
    book.add_argument("--pdf", type=Path, metavar="FILE", help="write the chapters to this PDF too (needs Chromium)")
    book.add_argument("--epub", type=Path, metavar="FILE", help="write the chapters to this EPUB too (needs Chromium)")
    tables = options.command(commands, "list", "tables:show", "list the names that options take")
    tables.add_argument("table", nargs="?", choices=options.TABLES, help="one of the tables (default: all)")
    completion = options.command(commands, "completion", "completion:show", "print a script for shell completion")
    completion.add_argument("shell", choices=("bash", "zsh"), help="as in: source <(pruning-lib completion bash)")
    return top


def _add_run(commands: Any) -> None:
    run = options.command(commands, "run", "run:run", "execute rows of notebooks/runs.yml")
    run.description = ("Execute rows of notebooks/runs.yml with papermill. The page and the record of a row appear "
                       "when it has finished.")
    run.add_argument("rows", nargs="*", metavar="ROW", help="names of rows")
    run.add_argument("--all", action="store_true", help="every row of runs.yml except those marked not_run")
    run.add_argument("--defaults", action="store_true", help="every notebook once, with its default parameters")
    run.add_argument("--stale", action="store_true", help="omit rows whose pages are up to date")
    run.add_argument("--stale-code", action="store_true", help=(
        "as --stale, but also run rows without a fingerprint of their code, which may be out of date"))
    run.add_argument("-j", "--jobs", type=options.count, default=1, metavar="N", help=(
        "rows at a time, each in its own process; 0: one per core (default: 1). Memory may allow fewer"))
    run.add_argument("--memory", type=float, default=0, metavar="GB",
                     help="memory for all rows together (default: free memory)")
    run.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="Dask cluster to run the rows on, one task each")
    run.add_argument("--retries", type=options.count, default=1, metavar="N",
                     help="runs repeated after a row's process died (default: 1)")
    run.add_argument("--name", help="name of the page and record of one run, for several pages of one notebook; "
                     "without --out they go to build/own")
    run.add_argument("-p", dest="overrides", action="append", default=[], metavar="NAME=VALUE", help=(
        "another value for a parameter, taken literally if the parameter is a text; the page goes under --out"))
    _add_places(run)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: current folder)")
    parser.add_argument("--out", type=Path, help="folder for pages and records instead of the published ones")
