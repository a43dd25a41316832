# SPDX-License-Identifier: Apache-2.0
"""`stasis process check`, `dump` and `restore`."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.memory_progress import memory_progress
from stasis.cli.options import add_command, seconds, size
from stasis.errors import ExitCode, UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.process.files.options import FileOptions

__all__ = ["COMMANDS"]

PAGE = 4096


def _add_check(group: Groups) -> None:
    command = add_command(group, "check", check, "Tell what of a process tree a dump could not keep.",
                          "stasis process check 4711")  # fmt: skip
    _add_target(command)
    _add_file_options(command)


def _add_dump(group: Groups) -> None:
    command = add_command(group, "dump", dump, "Write a process and its descendants to an image set, and end them.", """
stasis process dump 4711 --images /var/tmp/images
stasis process dump 4711 --images /var/tmp/images --leave-running
stasis process dump 4711 --images /var/tmp/images --pre-copy 5
""")
    _add_target(command)
    command.add_argument("--images", metavar="DIR", required=True, help="the directory to make; mode 0700")
    _add_file_options(command)
    after = command.add_mutually_exclusive_group()
    after.add_argument("--leave-running", action="store_true", help="let the processes run on")
    after.add_argument("--leave-stopped", action="store_true", help="leave the processes stopped, as SIGSTOP does")
    command.add_argument("--parent", metavar="DIR", help="the last pre-dump: write only what was written since")
    command.add_argument("--track", action="store_true",
                         help="with --leave-running: watch what is written from now on, as pre-dump does, so that "
                              "another dump can continue this one with --parent")
    command.add_argument("--pre-copy", metavar="N", type=_rounds, default=0,
                         help="copy memory in at most N rounds before the processes are stopped (0)")


def _add_pre_dump(group: Groups) -> None:
    command = add_command(group, "pre-dump", pre_dump, "Copy the memory of running processes ahead of a dump.", """
stasis process pre-dump 4711 --images /var/tmp/images-1
stasis process pre-dump 4711 --images /var/tmp/images-2 --parent /var/tmp/images-1
stasis process dump 4711 --images /var/tmp/images-3 --parent /var/tmp/images-2
""")
    _add_target(command)
    command.add_argument("--images", metavar="DIR", required=True, help="the directory to make; mode 0700")
    command.add_argument("--parent", metavar="DIR", help="the pre-dump before: write only what was written since")


def _add_restore(group: Groups) -> None:
    command = add_command(group, "restore", restore, "Bring the processes of an image set back.", """
stasis process restore --images /var/tmp/images
stasis process restore --images /var/tmp/images --attach
stasis process restore --images /var/tmp/images --map-path /srv/app.log=/tmp/app.log
""")
    command.add_argument("--images", metavar="DIR", required=True, help="the image set's directory")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--attach", action="store_true", help="wait for the first process, and end with its exit status")
    where.add_argument("--pidfile", metavar="FILE", help="write the pid of the first process to this file")
    command.add_argument("--manage-cgroups", choices=("soft", "ignore"), default="soft",
                         help="put processes into the control groups they were in, as far as that goes (soft), or not")
    command.add_argument("--pid-namespace", action="store_true",
                         help="restore into a new pid namespace, whoever has the pids outside")
    command.add_argument("--map-path", metavar="OLD=NEW", action="append", default=[],
                         help="use NEW for files and directories whose path is OLD or below it; may be repeated")
    command.add_argument("--root", metavar="DIR",
                         help="the directory that is the root of the processes from now on, with all files below it")
    command.add_argument("--leave-stopped", action="store_true",
                         help="leave the processes stopped, as SIGSTOP does")
    command.add_argument("--tcp", choices=("close",), default="",
                         help="close: bring TCP connections back as sockets that are not connected")
    command.add_argument("--veth", metavar="INSIDE=OUTSIDE[@BRIDGE]", action="append", default=[], type=_link,
                         help="what the other end of the network device INSIDE of the tree's own network namespace is "
                              "to be called here, and which bridge it is to be a part of; may be repeated")
    command.add_argument("--inherit-fd", metavar="FD=NAME", action="append", default=[], type=_inherited,
                         help="use descriptor FD of this command for what the images call NAME, as in 3=pipe:[4711]; "
                              "may be repeated")


COMMANDS = {"check": _add_check, "dump": _add_dump, "pre-dump": _add_pre_dump, "restore": _add_restore}
"""What adds each command to `stasis process`."""


def _add_file_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--file-locks", action="store_true", help="take file locks along")
    command.add_argument("--ghost-limit", metavar="SIZE", type=size, default=64 << 20,
                         help="take deleted files along that occupy at most this much (64M)")
    command.add_argument("--link-remap", action="store_true",
                         help="make a link for open files that lost their name and have others elsewhere; a restore "
                              "takes it away")
    command.add_argument("--shell-job", action="store_true",
                         help="the terminal is the caller's, or a session from outside of its pid namespace; a restore "
                              "takes those of its own caller")
    command.add_argument("--ext-unix-sk", action="store_true",
                         help="dump unix sockets whose other end is outside of the tree, without that end")
    command.add_argument("--tcp", choices=("established", "close"), default="",
                         help="keep TCP connections, or have them closed after the restore")
    command.add_argument("--network-lock", choices=("nftables", "skip"), default="nftables",
                         help="how packets of kept connections are dropped up to the restore (nftables); skip: not")
    command.add_argument("--skip-in-flight", action="store_true",
                         help="leave connections behind that a listening socket has not accepted yet")


def _file_options(arguments: argparse.Namespace) -> FileOptions:
    from stasis.process.files.options import FileOptions

    return FileOptions(ghost_limit=arguments.ghost_limit, external_unix=arguments.ext_unix_sk,
                       shell_job=arguments.shell_job, file_locks=arguments.file_locks,
                       tcp=arguments.tcp, network_lock=arguments.network_lock,
                       skip_in_flight=arguments.skip_in_flight, link_remap=arguments.link_remap)  # fmt: skip


def _inherited(text: str) -> tuple[str, int]:
    fd, separator, name = text.partition("=")
    if not separator or not fd.isdecimal() or not name:
        raise UsageError(f"{text!r} is no inherited descriptor", hint="write FD=NAME, as in 3=pipe:[4711]")
    return name, int(fd)


def _link(text: str) -> tuple[str, str]:
    inside, _, outside = text.partition("=")
    if not inside or not outside.partition("@")[0]:
        raise UsageError(f"{text!r} is no pair of network devices", hint="write INSIDE=OUTSIDE, as in eth0=veth0@br0")
    return inside, outside


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("pid", metavar="PID", type=_pid, help="the first process of the tree")
    command.add_argument("--timeout", metavar="SECONDS", type=seconds, default=10.0,
                         help="give up when the tree does not stop in time (10)")


def _pid(text: str) -> int:
    try:
        pid = int(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no pid", hint="give the number of a process") from error
    if pid <= 0:
        raise UsageError(f"{text!r} is no pid", hint="give the number of a process")
    return pid


def _rounds(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text!r} is no number of rounds", hint="give a whole number; 0 for none")
    return int(text)


def check(arguments: argparse.Namespace) -> int:
    """stasis process check"""
    from stasis.process.dump.job import check as check_tree

    found = check_tree(arguments.pid, timeout=arguments.timeout, files=_file_options(arguments))
    if arguments.json:
        output.print_json(found)
    elif found:
        for finding in found:
            print(finding)
    else:
        print(f"process {arguments.pid} and its descendants can be dumped")
    return ExitCode.UNSUPPORTED if found else ExitCode.OK


def dump(arguments: argparse.Namespace) -> None:
    """stasis process dump"""
    from stasis.process.dump.job import DumpOptions
    from stasis.process.dump.job import dump as dump_tree

    with memory_progress("copied", as_json=arguments.json) as shown:
        options = DumpOptions(leave_running=arguments.leave_running, leave_stopped=arguments.leave_stopped,
                              timeout=arguments.timeout, parent=arguments.parent,
                              pre_copy=arguments.pre_copy, files=_file_options(arguments),
                              track=arguments.track, progress=shown)  # fmt: skip
        result = dump_tree(arguments.pid, arguments.images, options)
    if arguments.json:
        output.print_json(result)
    else:
        _warn(result.warnings)
        print(f"dumped {len(result.pids)} processes with {result.threads} threads and "
              f"{format_size(result.pages * PAGE)} of memory to {result.images}; they stood still for "
              f"{result.frozen_seconds * 1000:.0f} ms")  # fmt: skip


def pre_dump(arguments: argparse.Namespace) -> None:
    """stasis process pre-dump"""
    from stasis.process.dump.predump import pre_dump as pre_dump_tree

    with memory_progress("copied", as_json=arguments.json) as shown:
        result = pre_dump_tree(arguments.pid, arguments.images, parent=arguments.parent, timeout=arguments.timeout,
                               progress=shown)  # fmt: skip
    if arguments.json:
        output.print_json(result)
    else:
        _warn(result.warnings)
        print(f"copied {format_size(result.pages * PAGE)} of memory of {len(result.pids)} processes to "
              f"{result.images}; they stood still for {result.frozen_seconds * 1000:.0f} ms")  # fmt: skip


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def restore(arguments: argparse.Namespace) -> int:
    """stasis process restore"""
    gc.disable()  # the processes wait for it, and what it would look through are modules: 5 ms of 60
    from stasis.process.files.options import FileOptions
    from stasis.process.restore.job import RestoreOptions
    from stasis.process.restore.job import restore as restore_tree

    options = RestoreOptions(map_paths=dict(map(_mapping, arguments.map_path)),
                             files=FileOptions(inherited=dict(arguments.inherit_fd), tcp=arguments.tcp),
                             pid_namespace=arguments.pid_namespace, links=dict(arguments.veth),
                             manage_cgroups=arguments.manage_cgroups == "soft",
                             leave_stopped=arguments.leave_stopped,
                             root=os.path.realpath(arguments.root) if arguments.root else "")  # fmt: skip
    with memory_progress("brought back", as_json=arguments.json) as shown:
        result = restore_tree(arguments.images, options._replace(progress=shown))
    _warn(result.warnings or [])
    if arguments.pidfile:
        with open(arguments.pidfile, "w") as file:
            file.write(f"{result.pid}\n")
    if arguments.json:
        output.print_json(result.as_dict())
    elif not arguments.attach:
        print(result.pid)
    if not arguments.attach:
        gc.freeze()  # as much again when Python ends
        return ExitCode.OK
    status = os.waitstatus_to_exitcode(os.waitpid(result.init or result.pid, 0)[1])
    return status if status >= 0 else 128 - status


def _mapping(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not separator or not old.startswith("/"):
        raise UsageError(f"{text!r} is no mapping of paths", hint="write OLD=NEW, as in /srv/app.log=/tmp/app.log")
    return old, os.path.abspath(new)
