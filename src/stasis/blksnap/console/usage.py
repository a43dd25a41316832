# SPDX-License-Identifier: Apache-2.0
"""The help of blksnap's console tool, its tables of options laid out as Boost does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from stasis.blksnap.console.commands import COMMANDS, Command
from stasis.blksnap.console.grammar import FLAG, MANY, Option

__all__ = ["all_commands", "of_command", "options_table"]

LINE_LENGTH = 79
"""Of the 80 that it assumes, Boost leaves the last one free."""
FIRST_COLUMN = 24
"""Boost's least width of the column of names; none of ours is longer."""


def all_commands() -> str:
    """What `blksnap help` prints: every command, in the order of the alphabet."""
    commands = "\n\n".join(of_command(COMMANDS[name]) for name in sorted(COMMANDS))
    return f"Usage:\n  blksnap COMMAND [OPTIONS]\n  blksnap help\n\nCommands:\n\n{commands}"


def of_command(command: Command) -> str:
    """What `blksnap COMMAND --help` prints: what it does, its usage line, its options."""
    return f"{command.name}: {command.text}\nUsage:\n  {_line(command)}\nOptions:\n{options_table(command.options)}"


def _line(command: Command) -> str:
    words = [_shown(option) for option in command.options if option.name != "help"]
    return " ".join(["blksnap", command.name, *words])


def _shown(option: Option) -> str:
    names = f"-{option.short}|--{option.name}"
    if option.kind == FLAG:
        return f"[{names}]"
    value = option.name.upper()
    return f"[{names} {value} ...]" if option.kind == MANY else f"[{names} {value}]"


def options_table(options: Iterable[Option]) -> str:
    """One line per option, longer texts on more."""
    return "\n".join(line for option in options for line in _rows(option))


def _rows(option: Option) -> list[str]:
    name = f"  -{option.short} [ --{option.name} ]" + ("" if option.kind == FLAG else " arg")
    texts = textwrap.wrap(option.text, LINE_LENGTH - FIRST_COLUMN)
    return [(name if not number else "").ljust(FIRST_COLUMN) + text for number, text in enumerate(texts)]
