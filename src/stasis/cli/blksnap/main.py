# SPDX-License-Identifier: Apache-2.0
"""Entry point of `blksnap`: finds the command, reads its options, and turns every failure into one line and 1.

Scripts compare what it prints, so texts are blksnap's, word by word. With --json an error is the object that all
commands of stasis print, and tells the cause in stasis's own words too.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from stasis.blksnap.console import commands, grammar
from stasis.cli.blksnap.session import Session
from stasis.errors import StasisError, UsageError

__all__ = ["main"]

FAILURE = 1
HELP_WORDS = ("help", "--help", "-h")
MODULES = {
    "devices": ("attach", "detach"),
    "events": ("snapshot_waitevent", "snapshot_watcher"),
    "maps": ("cbtinfo", "markdirtyblock", "readcbtmap", "tracker_collect"),
    "snapshots": ("snapshot_add", "snapshot_collect", "snapshot_create", "snapshot_destroy", "snapshot_info",
                  "snapshot_take"),
    "version": ("version",),
}  # fmt: skip
"""Where each command is: a function of its name that takes a Session. Loaded only when it runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code, 0 or 1."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script shall see that the tool died of the signal
    session = Session()
    try:
        _run(session, given)
        sys.stdout.flush()
    except StasisError as error:
        return _failed(session, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    except OSError as error:
        return _failed(session, StasisError(error.strerror or str(error), errno=error.errno or 0))
    finally:
        session.close()
    return 0


def _run(session: Session, given: Sequence[str]) -> None:
    if not given:
        raise UsageError("Command not found.", hint="blksnap help lists the commands")
    if given[0] in HELP_WORDS:
        _print_help(None)
        return
    command = _command(given[0])
    session.values = grammar.parse(command.options, given[1:])
    if session.has("help"):
        _print_help(command)
        return
    module = next(module for module, names in MODULES.items() if command.name in names)
    getattr(importlib.import_module(f"stasis.cli.blksnap.{module}"), command.name)(session)


def _command(word: str) -> commands.Command:
    if word in commands.REPLACED:
        raise UsageError(f"Command '{word}' is no more: {commands.REPLACED[word]}.")
    found = commands.command(word)
    if found is None:
        raise UsageError("Command is not set.", hint=f"there is no command {word!r}; blksnap help lists them")
    return found


def _print_help(command: commands.Command | None) -> None:
    from stasis.blksnap.console import usage

    print(usage.all_commands() if command is None else usage.of_command(command))


def _failed(session: Session, error: StasisError) -> int:
    sys.stdout.flush()
    if session.as_json:
        from stasis.cli import output

        output.print_error(error, as_json=True)
    else:
        print(error.message, file=sys.stderr)
    return FAILURE


if __name__ == "__main__":
    sys.exit(main())
