"""Output of the commands: lines or one JSON object, and errors in the words of the command line."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pruning_lib.experiments.records import finite

Command = Callable[[argparse.Namespace], tuple[dict[str, Any], str]]


def answer(act: Command, arguments: argparse.Namespace) -> int:
    """Execute a command and print its result; print errors that the user can correct and return status 1."""
    for talkative in ("lm_eval", "accelerate"):  # hide warnings about their internals
        logging.getLogger(talkative).setLevel(logging.ERROR)
    if arguments.quiet:
        _silence_transformers()
    try:
        with _no_bars() if arguments.quiet else nullcontext():
            facts, text = act(arguments)
    except (ValueError, OSError, ImportError) as error:  # ConnectionError is an OSError
        print(f"pruning-lib {arguments.command}: {in_options(str(error), arguments)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # that of torch
            raise
        print(f"pruning-lib {arguments.command}: out of memory: {error}\nGive --dtype bfloat16, which takes half, or "
              f"--device auto, which spreads a model over GPUs, memory and disk", file=sys.stderr)
        return 1
    print(json_text(facts) if arguments.json else text)
    return 0


def note(text: str, arguments: argparse.Namespace) -> None:
    """Print progress to standard error unless the command is quiet."""
    if not arguments.quiet:
        print(text, file=sys.stderr)


def json_text(facts: Any) -> str:
    """Return facts as JSON; infinities and NaN become null with a reason."""
    return json.dumps(finite(facts), indent=1, allow_nan=False)


def in_options(message: str, arguments: argparse.Namespace) -> str:
    """Return the message of a library function with arguments written as options: ``--heads-removed 2``."""
    message = message.replace("scope='neurons'", "--heads-removed 0").replace("=True", "")
    message = re.sub(r"\bmax_tokens=", "tokens=", message)
    message = re.sub(r"\bn=(?=\d)", "", message)
    spelled = {"reconstruction": "reconstruct"}
    for name in sorted(vars(arguments), key=len, reverse=True):
        option = "--" + spelled.get(name, name).replace("_", "-")
        message = re.sub(rf"(?<![\w-]){name}=(?:'([^']*)'|(?=\S))", rf"{option} \1", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w-]){name}\b", option, message)
    return message


def line(values: dict[str, Any]) -> str:
    """Return the measurements of one model as text."""
    parts = []
    if "text" in values:
        parts.append(f"perplexity {perplexity(values)} on {values['tokens']} tokens of {values['text']}")
    parts += [f"mean accuracy {accuracy(values)}"] if "tasks" in values else []
    return ", ".join(parts) or "not measured"


def accuracy(values: dict[str, Any]) -> str:
    """Return the mean accuracy as text."""
    tasks = values.get("tasks")
    mean = values.get(f"{tasks}_mean_fraction")
    return f"{mean:.3f} ({tasks})" if mean is not None else "not measured" if not tasks else f"see the values ({tasks})"


def perplexity(values: dict[str, Any]) -> str:
    """Return perplexity with its interval as text; a single window gives no interval."""
    if values.get("perplexity") is None:
        return values.get("perplexity_reason", "not measured")
    if values["perplexity_low"] is None or values["perplexity_high"] is None:
        return f"{values['perplexity']:.2f} [no interval from one window]"
    return f"{values['perplexity']:.2f} [{values['perplexity_low']:.2f}, {values['perplexity_high']:.2f}]"


@contextmanager
def _no_bars() -> Iterator[None]:
    """Disable every progress bar for the time of a block; a bar that is asked for ignores tqdm's own variable."""
    from tqdm import tqdm

    original: Any = tqdm.__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]


def _silence_transformers() -> None:
    from transformers.utils import logging as messages

    messages.set_verbosity_error()
    messages.disable_progress_bar()
