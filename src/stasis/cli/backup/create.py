# SPDX-License-Identifier: Apache-2.0
"""`stasis backup create`: back up devices, whole or what changed."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from stasis.cli import output
from stasis.cli.backup.options import add_repository, open_repository, secrets_of
from stasis.cli.backup.selecting import describe, tag_list
from stasis.cli.options import add_command, percentage, seconds, size
from stasis.errors import UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.job import CreateResult, Plan
    from stasis.backup.repo import Manifest, Repository
    from stasis.cli.options import Groups
    from stasis.daemon.backups import BackupJob

__all__ = ["add"]

STORAGE = "/var/tmp"
LONGEST_FREEZE = 60.0


def add(group: Groups) -> None:
    """Add the command."""
    command = add_command(group, "create", create, "Back up disks: whole the first time, then what changed.", """
stasis backup create disk.img --repo /srv/backup
stasis backup create data logs --repo s3://bucket/backup --tag nightly
stasis backup create disk.img --repo /srv/backup --dry-run
stasis backup create - --name dump --repo /srv/backup
""")
    command.add_argument("sources", metavar="SOURCE", nargs="+",
                         help="served and live devices, image files, block devices, UUID:NAME for a device of a "
                              "snapshot that exists, or - for standard input; all become one set")
    add_repository(command)
    command.add_argument("--kind", choices=("auto", "full", "incremental", "differential"), default="auto",
                         help="full: everything; incremental: what changed since the last backup; differential: what "
                              "changed since the last full one; auto (default): incremental where it can be, else full")
    command.add_argument("--base", metavar="ID", help="the backup that a differential one is made against")
    command.add_argument("--name", metavar="NAME", help="name of the source in the repository, if there is only one")
    command.add_argument("--host", metavar="NAME", help="whose backup it is (this host's name)")
    command.add_argument("--tag", metavar="TAG[,TAG]", type=tag_list, action="extend", default=[],
                         help="tags; may be given several times")
    _add_snapshot(command)
    _add_freeze(command)
    _add_reading(command)


def _add_snapshot(command: argparse.ArgumentParser) -> None:
    command.add_argument("--storage", metavar="PATH", default=STORAGE,
                         help=f"where the snapshot keeps old contents: a directory, file, block device or 'memory' "
                              f"({STORAGE})")
    command.add_argument("--limit", metavar="SIZE", type=size, help="the most it may take (what is free there)")
    command.add_argument("--pre-snapshot", metavar="COMMAND", help="run this in a shell before the snapshot")
    command.add_argument("--post-snapshot", metavar="COMMAND",
                         help="run this in a shell once the snapshot is taken, or has failed")


def _add_freeze(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-freeze", metavar="TIME", type=seconds, default=0.2,
                         help="how long the file systems of live devices may be frozen (200ms)")
    command.add_argument("--on-busy", choices=("freeze", "throttle", "fail"), default="freeze",
                         help="what to do where more is written than fits that: freeze for up to --busy-freeze "
                              "(default), throttle the cgroups that write for the time of the copy, or fail")
    command.add_argument("--busy-freeze", metavar="TIME", type=seconds, default=2.0,
                         help="how long --on-busy freeze may freeze (2s)")
    command.add_argument("--freeze-memory", metavar="SIZE", type=size,
                         help="memory for what changes on live devices while they are copied (a quarter of what is "
                              "available)")
    command.add_argument("--staging", metavar="DIR",
                         help="directory on another disk that takes what does not fit into that memory")
    command.add_argument("--staging-size", metavar="SIZE", type=size,
                         help="the most that --staging may take (what is free there)")


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--self-check", metavar="PERCENT", type=percentage, default=0.1,
                         help="share of the unchanged chunks that is read and compared with the parent (0.1, and 16 "
                              "chunks at least; 0 leaves it out)")
    command.add_argument("--self-check-seed", metavar="N", type=int, help="draw the sample that an earlier run named")
    command.add_argument("--on-read-error", choices=("fail", "skip"), default="fail",
                         help="what to do where a source cannot be read: fail (default), or store zeroes and end with "
                              "exit code 12")
    command.add_argument("--limit-rate", metavar="SIZE", type=size, help="bytes per second that are read at most")
    command.add_argument("--wait", metavar="SECONDS", type=seconds, default=0.0,
                         help="wait so long for a prune of the repository to end (0)")
    command.add_argument("--dry-run", action="store_true", help="only tell what would be read")


def create(arguments: argparse.Namespace) -> int:
    """stasis backup create"""
    from stasis.cli.backup.reporting import report

    _check(arguments)
    with report(arguments) as reporter:
        with _opening(arguments) as opened:
            from stasis.daemon.backups import back_up_once_open, plan_backup

            job = _job(arguments)
            if arguments.dry_run:
                plans = plan_backup(job, opened())
                reporter.finish({"dry_run": True, "plans": [plan.as_dict() for plan in plans]}, _plan_text(plans))
                return 0
            result = back_up_once_open(job, opened, reporter.progress)
        for warning in result.warnings:
            reporter.warn(warning)
        reporter.finish(_fields(result), "\n".join(_sentence(backup) for backup in result.backups))
        return int(result.exit_code)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what makes no sense before anything is done."""
    if not 0 < arguments.max_freeze <= LONGEST_FREEZE or not 0 < arguments.busy_freeze <= LONGEST_FREEZE:
        raise UsageError("a freeze takes more than nothing, and at most a minute",
                         hint="give --max-freeze and --busy-freeze a time such as 200ms")
    if arguments.staging_size is not None and arguments.staging is None:
        raise UsageError("--staging-size is for a staging area", hint="say where it is with --staging")
    if arguments.limit_rate == 0:
        raise UsageError("--limit-rate 0 would never end", hint="leave it out to read as fast as possible")
    if arguments.base is not None and arguments.kind != "differential":
        raise UsageError("--base is for differential backups", hint="add --kind differential")
    if arguments.host is not None and not (arguments.host.isprintable() and arguments.host.strip()):
        raise UsageError(f"{arguments.host!r} cannot be the name of a host", hint="use characters that can be seen")


@contextlib.contextmanager
def _opening(arguments: argparse.Namespace) -> Iterator[Callable[[], Repository]]:
    """Waits for the repository, which another thread opens: that is one long computation without the interpreter lock,
    during which the program is loaded and the sources are made ready. It is closed at the end."""
    open_ = partial(open_repository, arguments, read_only=arguments.dry_run)
    with ThreadPoolExecutor(1) as pool:
        opening: Future[Repository] = Future()
        if secrets_of(arguments).given:
            opening = pool.submit(open_)
        else:  # somebody may have to be asked, which a thread would not be interrupted in
            opening.set_result(open_())
        try:
            yield opening.result
        finally:
            if opening.exception() is None:
                opening.result().close()


def _job(arguments: argparse.Namespace) -> BackupJob:
    from pathlib import Path

    from stasis.backup.job import SampleOptions
    from stasis.daemon.backups import BackupJob
    from stasis.daemon.sources import SnapshotStorage
    from stasis.live.options import LiveOptions

    sample = SampleOptions(share=arguments.self_check / 100, seed=arguments.self_check_seed)
    return BackupJob(
        sources=arguments.sources, name=arguments.name, host=arguments.host, kind=arguments.kind, base=arguments.base,
        tags=tuple(arguments.tag), storage=SnapshotStorage(arguments.storage, arguments.limit),
        before=arguments.pre_snapshot, after=arguments.post_snapshot, sample=sample,
        skip_unreadable=arguments.on_read_error == "skip", rate=arguments.limit_rate, wait=arguments.wait,
        live=LiveOptions(max_freeze=arguments.max_freeze, busy_freeze=arguments.busy_freeze, on_busy=arguments.on_busy,
                         staging=None if arguments.staging is None else Path(arguments.staging),
                         staging_limit=arguments.staging_size,
                         **({} if arguments.freeze_memory is None else {"memory": arguments.freeze_memory})),
        run_dir=getattr(arguments, "run_dir", None), state_dir=getattr(arguments, "state_dir", None))


def _fields(result: CreateResult) -> dict[str, Any]:
    """The summary line."""
    backups = [describe(backup) for backup in result.backups]
    return {"set": result.set_id, "backups": backups, "warnings": list(result.warnings),
            "exit_code": int(result.exit_code)}


def _sentence(backup: Manifest) -> str:
    numbers = backup.statistics
    since = f" since {backup.parent[:8]}" if backup.parent else ""
    text = (f"{backup.id[:8]}  {backup.device}: {backup.kind}{since}, "
            f"{format_size(numbers['bytes_changed'])} changed of {format_size(backup.size)}, "
            f"read {format_size(numbers['bytes_read'])}, stored {format_size(numbers['bytes_stored'])}")
    if numbers["bytes_compared"]:
        text += f", compared {format_size(numbers['bytes_compared'])}"
    if "freeze_milliseconds" in numbers:
        text += f", {backup.consistency} ({numbers['freeze_milliseconds']} ms)"
    return f"{text}\n          {backup.note}" if backup.note else text


def _plan_text(plans: Sequence[Plan]) -> str:
    lines = []
    for plan in plans:
        read = "an unknown length" if plan.bytes_to_read is None else format_size(plan.bytes_to_read)
        since = f" since {plan.parent[:8]}" if plan.parent else ""
        reason = f" ({plan.reason})" if plan.reason else ""
        changed = output.size_text(plan.bytes_changed) or "unknown"
        lines.append(f"{plan.device}: {plan.kind}{since}{reason}; {changed} changed, would read {read}")
    return "\n".join(lines)
