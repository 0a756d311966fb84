"""Options of all commands.  This module loads no heavy package; the commands check names of tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TABLES = ("methods", "criteria", "texts", "models", "tasks", "rows")  # names that options take; see ``tables``
OWN_TEXT = ("a name (pruning-lib list texts), a file (.jsonl .json .txt .parquet; FILE:COLUMN), or a data set of the "
            "hub (ORG/NAME[/CONFIG][@SPLIT][:COLUMN])")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """State the default of every option that has a fixed one; the others describe theirs in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def command(commands: Any, name: str, act: str, about: str) -> argparse.ArgumentParser:
    """Add a command; ``act`` is the module of this folder and the function in it that executes the command."""
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".",
                                 formatter_class=Help)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes; results and errors only")
    parser.set_defaults(act=act)
    return parser


def add_model_commands(commands: Any) -> None:
    """Add the commands for a model of the user's own: inspect, prune, evaluate, compare."""
    inspect = command(commands, "inspect", "inspect:show",
                      "possible cuts of a model: fractions and head counts, or blocks")
    _named(inspect, "model", table="models", help="a name (pruning-lib list models), a local folder, or a hub name")
    _add_prune(commands)
    measure = command(commands, "evaluate", "measure:evaluate", "perplexity and zero-shot accuracy of one model")
    _named(measure, "model", table="models", help="a folder made by prune, or any other model; a card is updated")
    _add_measures(measure)
    pair = command(commands, "compare", "measure:compare", "two models with one tokenizer, on the same text and items")
    _named(pair, "first", table="models", help="for example the pruned model")
    _named(pair, "second", table="models", help="for example the dense model")
    _add_measures(pair)
    _add_export(commands)


def _add_export(commands: Any) -> None:
    parser = command(commands, "export", "export:export", "write a checkpoint as a file for llama.cpp")
    _named(parser, "model", table="models", help="a folder made by prune, or any other language model")
    parser.add_argument("--gguf", default="q8_0", choices=("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"),
                        help="format of the weights; those with a K want the package xllamacpp")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="new file, as in model.gguf")


def _add_prune(commands: Any) -> None:
    parser = command(commands, "prune", "prune:prune", "make a model smaller and save it as a plain checkpoint")
    _named(parser, "--model", table="models", required=True, help="a name, a local folder, or a hub name")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the checkpoint")
    parser.add_argument("--removed-fraction", type=fraction, metavar="X", help=(
        "fraction of all parameters to remove; may be left out with --experts-removed, and with --method none and "
        "--blocks-removed"))
    _named(parser, "--method", table="methods", default="amp", metavar="NAME",
           help="importance of heads and neurons, a function of your own as MODULE:FUNCTION, or none")
    parser.add_argument("--heads-removed", type=heads, default=0, metavar="N",
                        help="query heads per block, or same_share: the share of neurons, as in the paper")
    parser.add_argument("--experts-removed", type=count, default=0, metavar="N", help=(
        "experts per block of a mixture of experts; neurons inside the others make up the rest of the fraction"))
    parser.add_argument("--grouped-query", default="whole_groups", choices=("whole_groups", "equal_queries"),
                        help="removal of heads that share keys and values")
    parser.add_argument("--multiple-of", type=positive, metavar="N", help=(
        "round the neurons kept per block to a multiple; without it 32, as quantised files need, where the model has "
        "one, and 8 inside experts; 64 or 128 for a GPU, 1 for any number"))
    _named(parser, "--criterion", table="criteria", default="none", metavar="NAME",
           help="ranking of blocks, a function of your own as MODULE:FUNCTION, or none")
    parser.add_argument("--blocks-removed", type=count, default=0, metavar="N",
                        help=(
                            "blocks to remove after heads and neurons; with --method none, without it as many as come "
                            "nearest to the fraction"))
    parser.add_argument("--reconstruct", dest="reconstruction", default="auto",
                        choices=("auto", "none", "one_pass", "sequential", "asymmetric"), help=(
                            "least-squares reconstruction of the remaining weights; auto: sequential, and none where "
                            "blocks alone are removed"))
    _add_data(parser)
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the method random, and of recovery")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the folder to the hub when it is done")
    _add_measures(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    _named(parser, "--calibration", table="texts", metavar="TEXT", help=(
        f"calibration prompts: {OWN_TEXT}; without it alpaca, or mini_prompts where the extra eval is not installed"))
    parser.add_argument("--prompts", type=positive, metavar="N",
                        help="number of prompts, from the first on; without it 50, or all if there are fewer")
    _named(parser, "--reconstruction-text", table="texts", metavar="TEXT", help=(
        "text for reconstruction, and for methods that need long text, as --calibration; without it c4 beside alpaca, "
        "mini_calibration_text beside mini_prompts, and the calibration prompts beside your own"))
    parser.add_argument("--reconstruction-samples", type=positive, metavar="N",
                        help="number of texts, cut at 512 tokens; without it 100, or all if there are fewer")
    parser.add_argument("--allow-test-text", action="store_true", help="calibrate on test text all the same")
    _named(parser, "--recover", table="texts", metavar="TEXT", help=(
        "then tune with LoRA on these answers; a name, or a file or hub data set with :PROMPTS,ANSWERS"))
    parser.add_argument("--recover-pairs", type=positive, metavar="N", help="number of answers; without it all")
    parser.add_argument("--epochs", type=positive, default=2, metavar="N", help="epochs of recovery")
    parser.add_argument("--kd-weight", type=fraction, default=0.0, metavar="X",
                        help="weight of the distillation loss against the dense model, 0 to 1")
    parser.add_argument("--resume", type=Path, metavar="FOLDER",
                        help="folder for checkpoints of recovery; an existing one is resumed")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    _named(parser, "--text", table="texts", metavar="TEXT", help=(
        f"test text: {OWN_TEXT}; none measures no perplexity; without it wikitext2, or mini_text where the extra eval "
        f"is not installed"))
    parser.add_argument("--tokens", type=tokens, default=32768, metavar="N", help="number of tokens of it, or all")
    parser.add_argument("--window", type=positive, metavar="N",
                        help="longest context in tokens; without it 2048, or the model's positions if there are fewer")
    _named(parser, "--tasks", table="tasks", default="none", metavar="NAMES", help=(
        "zero-shot tasks: official, mini, none, or names of tasks and groups of lm-eval, joined by commas"))
    parser.add_argument("--dtype", default="auto", metavar="NAME",
                        help="number format of weights and arithmetic: auto (the checkpoint's own), float32, bfloat16")
    parser.add_argument("--device", metavar="NAME",
                        help="cpu, cuda, cuda:1, mps, auto; without it the GPU if there is one")
    parser.add_argument("--merge-adapter", action="store_true",
                        help="the folder holds an adapter: add it to the weights of its base model")


def _named(parser: argparse.ArgumentParser, *names: str, table: str, **arguments: Any) -> None:
    """Add an option that takes names of a table; ``completion`` reads the table's name from the action."""
    action: Any = parser.add_argument(*names, **arguments)
    action.table = table


def count(text: str) -> int:
    """Return ``text`` as a number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def tokens(text: str) -> int | None:
    """Return ``text`` as a number of tokens, or None for ``all``."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; give 2 or more, or all")
    return int(text)


def positive(text: str) -> int:
    """Return ``text`` as a number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """Return ``text`` as a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction; give a number from 0 to 1")
    return value


def heads(text: str) -> int | str:
    """Return ``text`` as a number of heads, or as the word ``same_share``."""
    if text == "same_share":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of query heads per block, or same_share")
    return int(text)
