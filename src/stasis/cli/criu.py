# SPDX-License-Identifier: Apache-2.0
"""`stasis-criu`: the commands and switches that scripts written for criu use, over stasis's own dump and restore.

A switch that is not implemented is an error that names it; none is taken and ignored, except those whose meaning is
what happens here anyway.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import stasis
from stasis.errors import StasisError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["build_parser", "main"]

FAILURE = 1
NOT_IMPLEMENTED = (
    "--prev-images-dir", "--track-mem", "--tcp-established", "--tcp-close", "--file-locks", "--link-remap",
    "--ext-unix-sk", "--shell-job", "-j", "--cgroup-root", "--external", "--ghost-limit", "--network-lock",
    "--skip-in-flight", "--freeze-cgroup", "--restore-sibling", "-S", "--force-irmap", "--action-script",
    "--inherit-fd", "--join-ns", "--lazy-pages", "--page-server", "--exec-cmd", "--root", "-r",
)  # fmt: skip
"""Switches of criu that mean something which is not done here yet."""


class _Parser(argparse.ArgumentParser):
    """Errors as one sentence."""

    def error(self, message: str) -> NoReturn:
        for word in message.removeprefix("unrecognized arguments: ").split():
            if word.partition("=")[0] in NOT_IMPLEMENTED:
                raise UnsupportedError(f"{word.partition('=')[0]} is not implemented", hint="stasis-criu --help")
        raise UsageError(message, hint="stasis-criu --help shows what there is")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="stasis-criu", description="Dump and restore processes with criu's commands and switches.",
                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("-V", "--version", action="version", version=f"Version: 4.2 (stasis {stasis.__version__})",
                        help="print the version of criu whose images these are")  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    command = _add(commands, "dump", dump, "write a process tree to images")
    command.add_argument("-t", "--tree", metavar="PID", type=int, required=True, help="the first process")
    after = command.add_mutually_exclusive_group()
    after.add_argument("-R", "--leave-running", action="store_true", help="let the processes run on")
    after.add_argument("-s", "--leave-stopped", action="store_true", help="leave the processes stopped")
    command.add_argument("--timeout", metavar="SECONDS", type=float, default=10.0, help="for stopping the tree (10)")
    command = _add(commands, "restore", restore, "bring the processes of images back")
    command.add_argument("-d", "--restore-detached", action="store_true", help="do not wait for the first process")
    command.add_argument("--pidfile", metavar="FILE", help="write the first process's pid to this file")
    command = _add(commands, "check", check, "tell whether this kernel has what is needed")
    command.add_argument("--feature", metavar="NAME", help="ask for one feature")
    return parser


def _add(
    commands: argparse._SubParsersAction[_Parser], name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("-D", "--images-dir", metavar="DIR", default=".", help="directory of the images (.)")
    command.add_argument("-W", "--work-dir", metavar="DIR", help="directory of log and pid files (that of the images)")
    command.add_argument("-o", "--log-file", metavar="FILE", help="where messages go (standard error)")
    command.add_argument("-v", "--verbosity", metavar="N", nargs="?", const="3", default="2", help="0 to 4")
    command.add_argument("--manage-cgroups", nargs="?", const="soft", choices=["none", "ignore"], default="ignore",
                         help="only none and ignore: processes join the cgroup of whoever restores them")  # fmt: skip
    command.add_argument("--no-default-config", action="store_true", help="no configuration file is read in any case")
    return command


def dump(arguments: argparse.Namespace) -> int:
    """stasis-criu dump"""
    from stasis.process.dump.job import DumpOptions
    from stasis.process.dump.job import dump as dump_tree

    options = DumpOptions(leave_running=arguments.leave_running, leave_stopped=arguments.leave_stopped,
                          timeout=arguments.timeout)  # fmt: skip
    dump_tree(arguments.tree, arguments.images_dir, options)
    return 0


def restore(arguments: argparse.Namespace) -> int:
    """stasis-criu restore"""
    from stasis.process.restore.job import restore as restore_tree

    result = restore_tree(arguments.images_dir)
    if arguments.pidfile:
        _work_path(arguments, arguments.pidfile).write_text(str(result.pid))
    if arguments.restore_detached:
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(result.pid, 0)[1])
    return status if status >= 0 else 128 - status


def check(arguments: argparse.Namespace) -> int:
    """stasis-criu check"""
    from stasis.process import features

    if arguments.feature is None:
        missing = [name for name in features.REQUIRED if not features.has(name)]
        print(f"Missing: {', '.join(missing)}" if missing else "Looks good.")
        return FAILURE if missing else 0
    found = features.has(arguments.feature)
    print(f"{arguments.feature} is {'supported' if found else 'not supported'}")
    return 0 if found else FAILURE


def _work_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where a file of log or pid lies: relative to the work directory, as criu has it."""
    return Path(arguments.work_dir or arguments.images_dir) / name


def main(given: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code, 1 for every failure as criu's is."""
    arguments: argparse.Namespace | None = None
    try:
        arguments = build_parser().parse_args(_joined(sys.argv[1:] if given is None else given))
        return int(arguments.run(arguments))
    except StasisError as error:
        _tell(arguments, f"Error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
    except OSError as error:
        _tell(arguments, f"Error: {error}\n")
        if arguments is not None and arguments.verbosity == "4":
            traceback.print_exc()
    return FAILURE


def _joined(words: Sequence[str]) -> list[str]:
    """`-v4` and `-vvvv` in one form, and commands before their switches, which criu takes in any order."""
    joined = [f"--verbosity={word.count('v')}" if word.strip("v") == "-" and word != "-" else word for word in words]
    commands = [word for word in joined if word in ("dump", "restore", "check")]
    return commands[:1] + [word for word in joined if word not in commands[:1]] if commands else joined


def _tell(arguments: argparse.Namespace | None, text: str) -> None:
    if arguments is None or not arguments.log_file:
        sys.stderr.write(text)
        return
    with open(_work_path(arguments, arguments.log_file), "a") as log:
        log.write(text)
