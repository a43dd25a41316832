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
from typing import TYPE_CHECKING, Any, NoReturn

import stasis
from stasis.cli.criu_scripts import Scripts
from stasis.cli.criu_switches import (
    ANYWAY,
    NOT_HERE,
    NOT_IMPLEMENTED,
    OF_DUMPS,
    OF_RESTORES,
    OTHER_COMMANDS,
    brought,
    cgroup_root,
    inherited,
    outside,
)
from stasis.cli.options import size
from stasis.errors import StasisError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stasis.process.files.options import FileOptions
    from stasis.process.restore.job import RestoreResult

__all__ = ["build_parser", "main"]

FAILURE = 1
COMMANDS = ("dump", "pre-dump", "restore", "check")


class _Parser(argparse.ArgumentParser):
    """Errors as one sentence."""

    def error(self, message: str) -> NoReturn:
        for command in OTHER_COMMANDS:
            if f"invalid choice: {command!r}" in message:
                raise UnsupportedError(f"{command} is not implemented", hint="there are dump, pre-dump, restore and "
                                       "check; who talks to criu by messages needs criu itself")  # fmt: skip
        for word in message.removeprefix("unrecognized arguments: ").split():
            if word.partition("=")[0] in (*NOT_IMPLEMENTED, *NOT_HERE):
                raise UnsupportedError(f"{word.partition('=')[0]} is not implemented", hint="stasis-criu --help")
        raise UsageError(message, hint="stasis-criu --help shows what there is")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="stasis-criu", description="Dump and restore processes with criu's commands and switches.",
                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("-V", "--version", action="version", version=f"Version: 4.2 (stasis {stasis.__version__})",
                        help="print the version of criu whose images these are")  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_dump(_add(commands, "dump", dump, "write a process tree to images"))
    command = _add(commands, "pre-dump", pre_dump, "copy the memory of a process tree while it runs on")
    _add_tree(command)
    _add_meaningless(command, OF_DUMPS | OF_RESTORES)
    _add_restore(_add(commands, "restore", restore, "bring the processes of images back"))
    command = _add(commands, "check", check, "tell whether this kernel has what is needed")
    command.add_argument("--feature", metavar="NAME", help="ask for one feature")
    for switch in ("--all", "--extra", "--experimental"):
        command.add_argument(switch, action="store_true", dest="all", help="ask for all features that are known")
    return parser


def _add_meaningless(command: argparse.ArgumentParser, switches: Mapping[str, int | str]) -> None:
    """Those that the command does not have itself."""
    there = {word for action in command._actions for word in action.option_strings}
    for switch, words in switches.items():
        if switch not in there:
            how: dict[str, Any] = {"action": "store_true"} if not words else {"metavar": "X"}
            if words == "?":
                how["nargs"] = "?"
            command.add_argument(switch, dest=f"meaningless {switch}", help="means nothing here, as with criu", **how)


def _add(
    commands: argparse._SubParsersAction[_Parser], name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("-D", "--images-dir", metavar="DIR", default=".", help="directory of the images (.)")
    command.add_argument("-W", "--work-dir", metavar="DIR", help="directory of log and pid files (that of the images)")
    command.add_argument("-o", "--log-file", metavar="FILE", help="where messages go (standard error)")
    command.add_argument("-v", "--verbosity", metavar="N", nargs="?", const=3, default=2, type=int, help="0 to 4")
    for switch, meaning in ANYWAY.items():
        command.add_argument(switch, action="store_true", help=meaning)
    return command


def _add_tree(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pre-dump-mode", choices=("splice", "read"),
                         help="how criu copies memory; here it is copied in one way")
    command.add_argument("-t", "--tree", metavar="PID", type=int, required=True, help="the first process")
    command.add_argument("--timeout", metavar="SECONDS", type=float, default=10.0, help="for stopping the tree (10)")
    command.add_argument("--prev-images-dir", metavar="DIR",
                         help="the set to continue, seen from the directory of the images")
    command.add_argument("--track-mem", action="store_true",
                         help="watch what is written from now on; pre-dump does in any case")


def _add_dump(command: argparse.ArgumentParser) -> None:
    _add_tree(command)
    _add_common(command)
    after = command.add_mutually_exclusive_group()
    after.add_argument("-R", "--leave-running", action="store_true", help="let the processes run on")
    after.add_argument("-s", "--leave-stopped", action="store_true", help="leave the processes stopped")
    command.add_argument("--ghost-limit", metavar="SIZE", type=size, default=1 << 20,
                         help="take deleted files along that occupy at most this much (1M)")
    command.add_argument("--network-lock", choices=("nftables", "skip", "iptables"), default="nftables",
                         help="how packets of kept connections are dropped (nftables)")
    command.add_argument("--skip-in-flight", action="store_true",
                         help="leave connections behind that a listener has not accepted yet")
    command.add_argument("--link-remap", action="store_true",
                         help="make links for open files that lost their names; the restore takes them away")
    command.add_argument("--freeze-cgroup", metavar="DIR", default="",
                         help="have this control group stand still while its processes are stopped")
    command.add_argument("--external", metavar="RES", action="append", default=[], type=outside,
                         help="leave unix[INODE], file[MOUNT:INODE] or tty[RDEV:DEV] to the restore's --inherit-fd; "
                              "mnt[]: mounts that are outside as well, which are left in any case")
    _add_meaningless(command, OF_RESTORES)


def _add_restore(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument("-d", "--restore-detached", action="store_true", help="do not wait for the first process")
    command.add_argument("-S", "--restore-sibling", action="store_true",
                         help="make the first process a child of this command's parent; with -d")
    command.add_argument("--cgroup-root", metavar="[CONTROLLER:]/GROUP", action="append", default=[],
                         type=cgroup_root, help="put processes below this group instead of the one they were below")
    command.add_argument("--external", metavar="RES", action="append", default=[], type=brought,
                         help="veth[IN]:OUT: what the other end of a network device is to be called, or OUT@BRIDGE; "
                              "mnt[KEY]:PATH: what stands for a mount that was outside; mnt[]: those that are there "
                              "still, which is so in any case")
    command.add_argument("--pidfile", metavar="FILE", help="write the first process's pid to this file")
    command.add_argument("-r", "--root", metavar="DIR", help="the directory that is to be the root of the processes")
    command.add_argument("-s", "--leave-stopped", action="store_true", help="leave the processes stopped")
    command.add_argument("--inherit-fd", metavar="fd[N]:RES", action="append", default=[], type=inherited,
                         help="use descriptor N of this command for what the images call RES, as pipe:[4711]")
    _add_meaningless(command, OF_DUMPS)


def _add_common(command: argparse.ArgumentParser) -> None:
    """What criu wants for both halves."""
    command.add_argument("--tcp-established", action="store_true", help="keep TCP connections")
    command.add_argument("--tcp-close", action="store_true", help="have TCP connections closed after the restore")
    command.add_argument("-l", "--file-locks", action="store_true", help="keep file locks; a restore does if they are")
    command.add_argument("-x", "--ext-unix-sk", action="store_true",
                         help="keep unix sockets whose other end is outside of the tree")
    command.add_argument("-j", "--shell-job", action="store_true", help="the terminal is that of the caller")
    command.add_argument("--manage-cgroups", metavar="MODE", nargs="?", const="soft", default="ignore",
                         choices=("none", "ignore", "soft"), help="none, ignore or soft (ignore; soft without MODE)")
    command.add_argument("--action-script", metavar="FILE", action="append", default=[],
                         help="run this program at each step, named by CRTOOLS_SCRIPT_ACTION; may be repeated")


def _file_options(arguments: argparse.Namespace) -> FileOptions:
    from stasis.process.files.options import FileOptions

    if arguments.tcp_established and arguments.tcp_close:
        raise UsageError("--tcp-established and --tcp-close exclude each other", hint="give one of them")
    return FileOptions(external_unix=arguments.ext_unix_sk, shell_job=arguments.shell_job,
                       file_locks=arguments.file_locks, tcp=_tcp(arguments))  # fmt: skip


def _tcp(arguments: argparse.Namespace) -> str:
    if arguments.tcp_close:
        return "close"
    return "established" if arguments.tcp_established else ""


def dump(arguments: argparse.Namespace) -> int:
    """stasis-criu dump"""
    from stasis.process.dump.job import DumpOptions
    from stasis.process.dump.job import dump as dump_tree

    if arguments.network_lock == "iptables":
        raise UnsupportedError("--network-lock iptables is not implemented", hint="use nftables or skip")
    files = _file_options(arguments)._replace(
        ghost_limit=arguments.ghost_limit, network_lock=arguments.network_lock,
        skip_in_flight=arguments.skip_in_flight, link_remap=arguments.link_remap,
        outside=frozenset(arguments.external) - {"mnt[]"},
    )  # fmt: skip
    scripts = Scripts(arguments.action_script, arguments.images_dir)

    def run(action: str) -> None:
        _note_of(scripts, arguments, action, arguments.tree)

    options = DumpOptions(
        leave_running=arguments.leave_running, leave_stopped=arguments.leave_stopped, timeout=arguments.timeout,
        parent=_previous(arguments), files=files, track=arguments.track_mem and arguments.leave_running,
        freeze_group=arguments.freeze_cgroup, hook=run if arguments.action_script else None,
    )  # fmt: skip
    try:
        with scripts:
            done = dump_tree(arguments.tree, arguments.images_dir, options)
    except StasisError as error:
        if not scripts.status:
            raise
        _complain(arguments, error)
        return scripts.status
    _note(arguments, done.warnings)
    _note(arguments, ["Dumping finished successfully"], level=3)
    return 0


def pre_dump(arguments: argparse.Namespace) -> int:
    """stasis-criu pre-dump"""
    from stasis.process.dump.predump import pre_dump as pre_dump_tree

    done = pre_dump_tree(arguments.tree, arguments.images_dir, parent=_previous(arguments), timeout=arguments.timeout)
    _note(arguments, done.warnings)
    _note(arguments, ["Pre-dumping finished successfully"], level=3)
    return 0


def _previous(arguments: argparse.Namespace) -> str | None:
    if not arguments.prev_images_dir:
        return None
    return os.path.join(os.path.abspath(str(arguments.images_dir)), str(arguments.prev_images_dir))


def restore(arguments: argparse.Namespace) -> int:
    """stasis-criu restore"""
    from stasis.process.restore.job import RestoreOptions
    from stasis.process.restore.job import restore as restore_tree

    if arguments.restore_sibling and not arguments.restore_detached:
        raise UsageError("--restore-sibling needs --restore-detached", hint="its parent is to wait for it, not this")
    if arguments.cgroup_root and arguments.manage_cgroups != "soft":
        raise UsageError("--cgroup-root needs --manage-cgroups", hint="without it processes stay where the restorer is")
    scripts = Scripts(arguments.action_script, arguments.images_dir)
    options = RestoreOptions(
        sibling=arguments.restore_sibling, cgroup_roots=dict(arguments.cgroup_root),
        links={name: given for kind, name, given in arguments.external if kind == "veth"},
        map_paths={name: given for kind, name, given in arguments.external if kind == "mnt" and name},
        files=_file_options(arguments)._replace(inherited=dict(arguments.inherit_fd)),
        manage_cgroups=arguments.manage_cgroups == "soft",
        hook=lambda action, pid: _note_of(scripts, arguments, action, pid), leave_stopped=arguments.leave_stopped,
        root=os.path.realpath(arguments.root) if arguments.root else "",
    )
    with scripts:
        result = restore_tree(arguments.images_dir, options)
    if arguments.pidfile:
        with open(_work_path(arguments, arguments.pidfile), "w") as file:
            file.write(str(result.pid))
    _write_statistics(arguments, result)
    _note(arguments, result.warnings or [])
    _note(arguments, ["Restore finished successfully. Tasks resumed."], level=3)
    if arguments.restore_detached:
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(result.pid, 0)[1])
    return status if status >= 0 else 128 - status


def _note_of(scripts: Scripts, arguments: argparse.Namespace, action: str, pid: int) -> None:
    if note := scripts.run(action, pid):
        _note(arguments, [note])


def _write_statistics(arguments: argparse.Namespace, result: RestoreResult) -> None:
    """stats-restore in the work directory: microseconds."""
    from stasis.process.images.kinds import KINDS
    from stasis.process.images.schema.inventory import RestoreStatsEntry, StatsEntry
    from stasis.process.images.writer import ImageWriter

    figures = RestoreStatsEntry(
        pages_compared=result.pages_compared, pages_skipped_cow=result.pages_shared,
        restore_time=int(result.seconds * 1e6), forking_time=int(result.forking_seconds * 1e6),
    )  # fmt: skip
    path = _work_path(arguments, KINDS["stats-restore"].file_name())
    with ImageWriter(KINDS["stats-restore"], lambda: open(path, "w+b")) as image:
        image.append(StatsEntry(restore=figures))


def check(arguments: argparse.Namespace) -> int:
    """stasis-criu check"""
    from stasis.process import features

    if arguments.feature is None:
        wanted = features.PROBES if arguments.all else features.REQUIRED
        missing = [name for name in wanted if not features.has(name)]
        print(f"Missing: {', '.join(missing)}" if missing else "Looks good.")
        return FAILURE if missing else 0
    found = features.has(arguments.feature)
    print(f"{arguments.feature} is {'supported' if found else 'not supported'}")
    return 0 if found else FAILURE


def _work_path(arguments: argparse.Namespace, name: str) -> str:
    """Where a file of log or pid lies: relative to the work directory, as criu has it."""
    return os.path.join(arguments.work_dir or arguments.images_dir, name)


def main(given: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code, 1 for every failure as criu's is."""
    arguments: argparse.Namespace | None = None
    try:
        arguments = build_parser().parse_args(_joined(sys.argv[1:] if given is None else given))
        return int(arguments.run(arguments))
    except StasisError as error:
        _complain(arguments, error)
    except OSError as error:
        _tell(arguments, f"Error: {error}\n")
        if arguments is not None and arguments.verbosity >= 4:
            traceback.print_exc()
    return FAILURE


def _joined(words: Sequence[str]) -> list[str]:
    """`-v4` and `-vvvv` in one form, and commands before their switches, which criu takes in any order."""
    joined = [f"--verbosity={word.count('v')}" if word.strip("v") == "-" and word != "-" else word for word in words]
    commands = [word for word in joined if word in COMMANDS]
    return commands[:1] + [word for word in joined if word not in commands[:1]] if commands else joined


def _note(arguments: argparse.Namespace, lines: Sequence[str], level: int = 2) -> None:
    """Warnings (2), and what is said where everything is told (3)."""
    if lines and arguments.verbosity >= level:
        _tell(arguments, "".join(f"{line}\n" for line in lines))


def _complain(arguments: argparse.Namespace | None, error: StasisError) -> None:
    _tell(arguments, f"Error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))


def _tell(arguments: argparse.Namespace | None, text: str) -> None:
    if arguments is None or not arguments.log_file:
        sys.stderr.write(text)
        return
    with open(_work_path(arguments, arguments.log_file), "a") as log:
        log.write(text)
