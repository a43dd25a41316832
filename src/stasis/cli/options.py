# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options of all of them, types of arguments, and the connection to the daemon."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from stasis.errors import UsageError
from stasis.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from stasis.daemon.client import Client

__all__ = ["Command", "Parser", "add_command", "add_group", "byte_range", "connect", "number_list", "percentage",
           "seconds", "size"]

Command = Callable[[argparse.Namespace], int | None]


def _width() -> int:
    """Columns for help texts. argparse asks shutil, which costs each command 3 ms, whether it prints help or not."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) - 2
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns - 2
    except (OSError, ValueError, AttributeError):
        return 78


class Help(argparse.HelpFormatter):
    """As wide as the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width())


class RawHelp(Help, argparse.RawDescriptionHelpFormatter):
    """The same with lines as they were written."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence and a hint, like everything else here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a word that may be left out may stand behind options, too: argparse takes it as left
        out as soon as it meets one (python/cpython issue 59317)."""
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            is_free = action.nargs == "?" and action.choices is None and action.type is None
            if is_free and rest and not rest[0].startswith("-") and getattr(parsed, action.dest) == action.default:
                setattr(parsed, action.dest, rest.pop(0))
        return parsed, rest


if TYPE_CHECKING:
    Groups = argparse._SubParsersAction[Parser]


def add_group(groups: Groups, name: str, description: str) -> Groups:
    """A group of commands, such as `stasis device`."""
    parser = groups.add_parser(name, help=description, description=description)
    add_directories(parser)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser,
                                 prog=parser.prog)


def add_command(group: Groups, name: str, run: Command, description: str, examples: str = "", *,
                json: bool = True) -> Parser:
    """A command: `run` is called with the parsed arguments. `examples` are shown below its help, one per line."""
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()) if examples else None
    parser = group.add_parser(name, help=description, description=description, epilog=epilog,
                              formatter_class=RawHelp)
    parser.set_defaults(run=run)
    add_directories(parser)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON, errors too")
    return parser


def add_directories(parser: argparse.ArgumentParser) -> None:
    """--run-dir and --state-dir, which may stand before or behind the command."""
    parser.add_argument("--run-dir", metavar="DIR", default=argparse.SUPPRESS,
                        help="directory of sockets and snapshots (STASIS_RUN_DIR)")
    parser.add_argument("--state-dir", metavar="DIR", default=argparse.SUPPRESS,
                        help="directory of change maps and settings (STASIS_STATE_DIR)")


def add_tls(parser: argparse.ArgumentParser, what: str) -> None:
    """--tcp and what secures it."""
    parser.add_argument("--tcp", metavar="ADDR:PORT", help=what)
    parser.add_argument("--tls-certificates", metavar="DIR",
                        help="require TLS with client certificates: ca-cert.pem, server-cert.pem and server-key.pem")
    parser.add_argument("--tls-psk", metavar="FILE", help="require TLS with a shared key: lines of USER:HEXKEY")


def size(text: str) -> int:
    """A size with K, M, G or T, in bytes."""
    return parse_size(text)


def seconds(text: str) -> float:
    """A time with ms, s or m, in seconds."""
    return parse_seconds(text)


def byte_range(text: str) -> tuple[int, int]:
    """OFFSET:LENGTH, both sizes, in bytes."""
    offset, separator, length = text.partition(":")
    if not separator:
        raise UsageError(f"{text!r} is no range", hint="write OFFSET:LENGTH, as in 10G:64K")
    return parse_size(offset), parse_size(length)


def number_list(text: str) -> list[int]:
    """Change numbers separated by commas."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of change numbers",
                         hint="write numbers with commas, as in 3,7") from error
    if not all(0 <= number <= 255 for number in numbers):
        raise UsageError(f"{text!r} holds a number that is no change number", hint="they go from 0 to 255")
    return numbers


def percentage(text: str) -> float:
    """A number from 0 to 100, with or without a percent sign."""
    try:
        value = float(text.rstrip("%"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no percentage", hint="write a number from 0 to 100, as in 0.1") from error
    if not 0 <= value <= 100:
        raise UsageError(f"{text!r} is no percentage", hint="write a number from 0 to 100, as in 0.1")
    return value


def connect(arguments: argparse.Namespace, *, start_daemon: bool = True) -> Client:
    """Connect to the daemon; one that had to be started is mentioned on standard error."""
    from stasis.daemon import client

    def started(pid: int) -> None:
        print(f"stasis: started the daemon (pid {pid})", file=sys.stderr)

    return client.connect(getattr(arguments, "run_dir", None), getattr(arguments, "state_dir", None),
                          start_daemon=start_daemon, started=started)
