"""The command ``completion``: a script for bash or zsh, generated from the parser and the tables."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pruning_lib.cli import tables

SCRIPT = """\
# {shell} completion of pruning-lib; load it with: source <(pruning-lib completion {shell})
{prelude}_pruning_lib() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  local names=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    names="{commands}"
  else
    case "$command $previous" in
{values}
      *)
        case "$command" in
{options}
        esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$names" -- "$word"))
  if [ ${{#COMPREPLY[@]}} -eq 0 ]; then COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -F _pruning_lib pruning-lib
"""


def show(arguments: argparse.Namespace) -> int:
    """Print the script."""
    text = script(arguments.shell)
    print(json.dumps({"shell": arguments.shell, "script": text}) if arguments.json else text, end="")
    return 0


def script(shell: str) -> str:
    """Return the completion script of all commands, options and named values."""
    from pruning_lib.cli.main import parser

    commands = _commands(parser())
    values, options = [], []
    for name, command in commands.items():
        words: list[str] = []
        for action in command._actions:
            names = _names(action)
            words += action.option_strings or names
            if action.option_strings and names:
                spelled = "|".join(f'"{name} {option}"' for option in action.option_strings)
                values.append(f'      {spelled}) names="{" ".join(names)}" ;;')
        options.append(f'          {name}) names="{" ".join(words)}" ;;')
    prelude = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return SCRIPT.format(shell=shell, prelude=prelude, commands=" ".join(commands), values="\n".join(values),
                         options="\n".join(options))


def _commands(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return next(action.choices for action in parser._actions  # type: ignore[return-value]
                if isinstance(action, argparse._SubParsersAction))


def _names(action: Any) -> list[str]:
    """Return the values an argument is known to take."""
    if action.choices:
        return [str(choice) for choice in action.choices]
    return list(tables.entries(action.table)) if hasattr(action, "table") else []
