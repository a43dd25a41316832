# SPDX-License-Identifier: Apache-2.0
"""`dbdctl`: dattobd's control tool, with its arguments, messages and exit statuses, over the stasis daemon.

Everything that fails exits with 255. Numbers are read as the tool reads them: decimal digits only, a leading 0 makes
them octal. Scripts that work with the module's tool work with this one; docs/guide/datto.md says what differs.
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import EINVAL, ENOENT, ERANGE

__all__ = ["main"]

FAILURE = 255
LLONG_MAX = (1 << 63) - 1

USAGE = """\
usage: dbdctl <sub-command> [options] <arguments>

sub-commands:
  setup-snapshot [-c <cache size>] [-f <fallocate>] <block device> <cow file> <minor>
  reload-snapshot [-c <cache size>] <block device> <cow file> <minor>
  reload-incremental [-c <cache size>] <block device> <cow file> <minor>
  destroy <minor>
  transition-to-incremental <minor>
  transition-to-snapshot [-f <fallocate>] <cow file> <minor>
  reconfigure [-c <cache size>] <minor>
  expand-cow-file <size> <minor>
  reconfigure-auto-expand [-r <reserved space>] <step size> <minor>
  help

<cache size> is in bytes; <fallocate>, <size>, <step size> and <reserved space> are in MiB.
"""


class _BadParameters(Exception):
    """What was given cannot be understood; `errno` as the tool would have it."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


def _number(text: str, limit: int = LLONG_MAX) -> int:
    """Decimal digits; with base 0 as strtoul has it, so that a leading 0 means octal up to the first digit above 7."""
    if not (text.isascii() and text.isdigit()):
        raise _BadParameters(0)
    if text.startswith("0"):
        digits = text[: next((place for place, digit in enumerate(text) if digit > "7"), len(text))]
        value = int(digits, 8)
    else:
        value = int(text)
    if value >= limit:
        raise _BadParameters(ERANGE)
    return value


def _minor(text: str) -> int:
    """Cut to 32 bits; the driver's part checks the range."""
    return _number(text, 1 << 64) & 0xFFFFFFFF


@dataclass(frozen=True)
class _Command:
    """`options` for getopt, the number of arguments, and what to call with options and arguments."""

    operation: str
    options: str
    count: int
    run: Callable[[dict[str, int], list[str]], Callable[[], object]]


def _setup(options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[2])
    return lambda: datto.dattobd_setup_snapshot(minor, given[0], given[1], options.get("-f", 0), options.get("-c", 0))


def _reload_snapshot(options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[2])
    return lambda: datto.dattobd_reload_snapshot(minor, given[0], given[1], options.get("-c", 0))


def _reload_incremental(options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[2])
    return lambda: datto.dattobd_reload_incremental(minor, given[0], given[1], options.get("-c", 0))


def _destroy(_options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[0])
    return lambda: datto.dattobd_destroy(minor)


def _to_incremental(_options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[0])
    return lambda: datto.dattobd_transition_incremental(minor)


def _to_snapshot(options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[1])
    return lambda: datto.dattobd_transition_snapshot(minor, given[0], options.get("-f", 0))


def _reconfigure(options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    minor = _minor(given[0])
    return lambda: datto.dattobd_reconfigure(minor, options.get("-c", 0))


def _expand(_options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    size, minor = _number(given[0], 1 << 64), _minor(given[1])
    return lambda: datto.dattobd_expand_cow_file(minor, size)


def _auto_expand(options: dict[str, int], given: list[str]) -> Callable[[], object]:
    from stasis import datto

    step, minor = _number(given[0], 1 << 64), _minor(given[1])
    return lambda: datto.dattobd_reconfigure_auto_expand(minor, step, options.get("-r", 0))


_COMMANDS = {
    "setup-snapshot": _Command("setup snapshot", "c:f:", 3, _setup),
    "reload-snapshot": _Command("reload snapshot", "c:", 3, _reload_snapshot),
    "reload-incremental": _Command("reload incremental", "c:", 3, _reload_incremental),
    "destroy": _Command("destroy", "", 1, _destroy),
    "transition-to-incremental": _Command("transition to incremental", "", 1, _to_incremental),
    "transition-to-snapshot": _Command("transition to snapshot", "f:", 2, _to_snapshot),
    "reconfigure": _Command("reconfigure", "c:", 1, _reconfigure),
    "expand-cow-file": _Command("expand", "", 2, _expand),
    "reconfigure-auto-expand": _Command("reconfigure auto expand", "r:", 2, _auto_expand),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns 0 or 255."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        print(USAGE, end="")
        return FAILURE
    if not _is_loaded():
        print(f"driver does not appear to be loaded: {os.strerror(EINVAL)}", file=sys.stderr)
        print("no stasis daemon runs; stasis device attach starts one and serves a device", file=sys.stderr)
        return FAILURE
    command = _COMMANDS.get(given[0])
    if command is None:
        print(USAGE, end="")
        return 0 if given[0] == "help" else FAILURE
    return _run(command, given[1:])


def _is_loaded() -> bool:
    """What /dev/datto-ctl is to the module's tool, the daemon's socket is here."""
    from stasis.daemon.client import connect
    from stasis.errors import StasisError

    try:
        connect(start_daemon=False).close()
    except StasisError:
        return False
    return True


def _run(command: _Command, given: list[str]) -> int:
    try:
        call = _interpreted(command, given)
    except _BadParameters as error:
        print(f"error interpreting {command.operation} parameters: {os.strerror(error.errno)}", file=sys.stderr)
        print(USAGE, end="")
        return FAILURE
    try:
        call()
    except OSError as error:
        print("driver returned an error performing specified action. check dmesg for more info: "
              f"{os.strerror(error.errno or ENOENT)}", file=sys.stderr)
        print("\n".join([error.strerror or "", *getattr(error, "__notes__", [])]).strip(), file=sys.stderr)
        return FAILURE
    return 0


def _interpreted(command: _Command, given: list[str]) -> Callable[[], object]:
    try:
        found, rest = getopt.gnu_getopt(given, command.options) if command.options else ([], given)
    except getopt.GetoptError as error:
        print(f"dbdctl: {error.msg}", file=sys.stderr)
        raise _BadParameters(EINVAL) from error
    options = {name: _number(value) for name, value in found}
    if len(rest) != command.count:
        raise _BadParameters(EINVAL)
    return command.run(options, rest)


if __name__ == "__main__":
    sys.exit(main())
