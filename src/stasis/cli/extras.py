# SPDX-License-Identifier: Apache-2.0
"""`stasis completion` and `stasis version`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import stasis
from stasis.cli import output
from stasis.cli.options import add_command
from stasis.errors import UnsupportedError

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(groups: Groups) -> None:
    """Add the commands."""
    command = add_command(groups, "completion", completion, "Print a script that completes commands in a shell.", """
stasis completion bash > ~/.local/share/bash-completion/completions/stasis
""", json=False)
    command.add_argument("shell", metavar="SHELL", choices=["bash", "zsh"], help="bash or zsh")
    command.add_argument("--command", choices=["stasis", "blksnap"], default="stasis",
                         help="which command's: stasis or blksnap (stasis)")
    add_command(groups, "version", version, "Print the version.", "stasis version --json")


def completion(arguments: argparse.Namespace) -> None:
    """stasis completion"""
    try:
        import shtab
    except ImportError as error:
        raise UnsupportedError("completion needs the Python package shtab",
                               hint="pip install 'stasis[completion]'") from error
    if arguments.command == "blksnap":
        from stasis.cli.blksnap.parser import build_parser
    else:
        from stasis.cli.main import build_parser

    print(shtab.complete(build_parser(), arguments.shell))


def version(arguments: argparse.Namespace) -> None:
    """stasis version"""
    if arguments.json:
        output.print_json({"version": stasis.__version__})
    else:
        print(stasis.__version__)
