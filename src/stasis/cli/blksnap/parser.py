# SPDX-License-Identifier: Apache-2.0
"""The commands as an argument parser, from which completions and the manual page are made; nothing is parsed by it."""

from __future__ import annotations

import argparse

from stasis.blksnap.console.commands import COMMANDS
from stasis.blksnap.console.grammar import FLAG, MANY, Option

__all__ = ["build_parser"]

PATHS = ("device", "file")


def build_parser() -> argparse.ArgumentParser:
    """A parser of the words and options that `blksnap help` lists."""
    parser = argparse.ArgumentParser(prog="blksnap", description="Snapshot block devices with blksnap's words.")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.text, description=command.text)
        for option in command.options:
            if option.name != "help":
                _add(own, option)
    return parser


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    names = f"-{option.short}", f"--{option.name}"
    if option.kind == FLAG:
        parser.add_argument(*names, action="store_true", help=option.text)
        return
    action = parser.add_argument(*names, metavar=option.name.upper(), help=option.text,
                                 nargs="+" if option.kind == MANY else None)  # fmt: skip
    if option.name in PATHS:
        action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # type: ignore[attr-defined]
