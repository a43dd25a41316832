# SPDX-License-Identifier: Apache-2.0
"""The `stasis` command: the parser of all commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import stasis
from stasis.cli.options import Parser, RawHelp, add_directories
from stasis.errors import ExitCode, StasisError

__all__ = ["build_parser", "main"]

GROUPS = ("device", "snapshot", "map", "track", "datto", "backup", "repo", "process", "settings", "daemon")
"""Modules with commands, imported when the command of that name is asked for; all are for the help."""

EPILOG = """\
first steps:
  stasis device attach disk.img                 serve an image file; prints its NBD URI
  stasis snapshot create --storage /var/tmp disk.img --take
                                                keep it as it is now; prints the snapshot's UUID
  stasis snapshot copy UUID disk.img backup.img copy it as it was then
  stasis map changed disk.img --since 1         what was written since

`stasis COMMAND --help` explains each command. The exit codes are in stasis(1).
"""


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the whole command line; where it is known, at least what these words of one need."""
    parser = Parser(prog="stasis", description="Snapshot block devices while they are written, and know what changed.",
                    epilog=EPILOG, formatter_class=RawHelp)
    parser.add_argument("--version", action="version", version=f"stasis {stasis.__version__}",
                        help="print the version")
    add_directories(parser)
    groups = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser,
                                   prog=parser.prog)
    for name in words[:1] if words and words[0] in GROUPS else [*GROUPS, "extras"]:
        module = importlib.import_module(f"stasis.cli.{name}")
        wanted = [word for word in words[1:2] if word in getattr(module, "COMMANDS", ())]
        module.add(groups, *wanted)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in given
    try:
        parsed = build_parser(given).parse_args(given)
        result: int | None = parsed.run(parsed)
        sys.stdout.flush()
        return result or ExitCode.OK
    except StasisError as error:
        _print_error(error, as_json)
        return error.exit_code
    except BrokenPipeError:
        # The reader has seen enough, as `stasis map changed ... | head` does. Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except KeyboardInterrupt:
        print("stasis: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _print_error(StasisError(f"{where}{error.strerror or error}", errno=error.errno or 0), as_json)
        return ExitCode.FAILURE


def _print_error(error: StasisError, as_json: bool) -> None:
    from stasis.cli import output

    output.print_error(error, as_json=as_json)
