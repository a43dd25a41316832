# SPDX-License-Identifier: Apache-2.0
"""`stasis backup restore`, `apply` and `verify`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from stasis.cli.backup.options import add_latest, add_repository, open_repository
from stasis.cli.backup.reporting import Reporter, report
from stasis.cli.options import add_command, percentage, size
from stasis.errors import StasisError, UsageError, VerifyError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.repo import Manifest, Repository
    from stasis.backup.restore import RestoreResult, VerifyResult
    from stasis.cli.options import Groups, Parser

__all__ = ["add"]

STORAGE = "/var/tmp"
STREAM = "-"
SHOWN_EXTENTS = 20


def add(group: Groups) -> None:
    """Add the commands."""
    _add_restore(group)
    _add_apply(group)
    _add_verify(group)


def _add_restore(group: Groups) -> None:
    command = add_command(group, "restore", restore, "Restore a backup to a file, a block device or a pipe.", """
stasis backup restore latest disk.img --repo /srv/backup
stasis backup restore 9f2c /dev/sdb --in-place --overwrite
stasis backup restore 9f2c --output - | ssh host dd of=/dev/sdb bs=1M
""")
    _add_backup(command)
    command.add_argument("target", metavar="TARGET", nargs="?",
                         help="the file or block device to write, or - for standard output")
    command.add_argument("--output", metavar="TARGET", help="the same as TARGET")
    command.add_argument("--in-place", action="store_true", help="write only what the target does not hold already")
    command.add_argument("--overwrite", action="store_true", help="go over whatever the target holds")
    command.add_argument("--verify", action="store_true", help="read the target back and compare")


def _add_apply(group: Groups) -> None:
    command = add_command(group, "apply", apply, "Bring a restored backup up to a later one by what changed.", """
stasis backup apply latest disk.img --repo /srv/backup
stasis backup apply 9f2c /dev/sdb --from 41d7
""")
    _add_backup(command)
    command.add_argument("target", metavar="TARGET", help="the file or block device that holds the earlier backup")
    command.add_argument("--from", dest="base", metavar="ID",
                         help="the backup that it holds (as noted in the file's attributes by the restore)")
    command.add_argument("--sample", metavar="PERCENT", type=percentage, default=0.1,
                         help="share of the target to compare with the earlier backup before anything is written (0.1)")
    command.add_argument("--sample-seed", metavar="N", type=int, help="draw the sample that an earlier run named")
    command.add_argument("--verify", action="store_true", help="read back what was written and compare")


def _add_verify(group: Groups) -> None:
    command = add_command(group, "verify", verify, "Verify a backup: its stored data, or against its origin.", """
stasis backup verify latest --repo /srv/backup
stasis backup verify latest --live disk.img
stasis backup verify 9f2c --live /dev/sdb --read-data
""")
    _add_backup(command)
    command.add_argument("--live", metavar="SOURCE",
                         help="compare with this served device, image file or block device, but for what is known to "
                              "have changed since the backup")
    command.add_argument("--read-data", action="store_true",
                         help="with --live: also read and check all stored data, as is done without --live")
    command.add_argument("--storage", metavar="PATH",
                         help=f"with --live: where the snapshot of a served device keeps old contents ({STORAGE})")
    command.add_argument("--limit", metavar="SIZE", type=size,
                         help="with --live: the most it may take (what is free there)")


def _add_backup(command: Parser) -> None:
    command.add_argument("id", metavar="ID", help="the backup: its id, the beginning of it, or latest")
    add_repository(command)
    add_latest(command)


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace, lines: TextIO | None = None) -> Iterator[tuple[Reporter, Repository]]:
    """The repository, with progress shown; a signal ends what is done with it in an orderly way."""
    from stasis.daemon.signals import interrupted_by_sigterm

    with (interrupted_by_sigterm(), report(arguments, lines=lines) as reporter,
          open_repository(arguments, read_only=True) as repository):
        yield reporter, repository


def _resolve(arguments: argparse.Namespace, repository: Repository, text: str) -> Manifest:
    return repository.resolve(text, host=arguments.host, device=arguments.device)


def restore(arguments: argparse.Namespace) -> None:
    """stasis backup restore"""
    target = _target(arguments)
    if target == STREAM:
        _restore_to_stdout(arguments)
        return
    with _opened(arguments) as (reporter, repository):
        from stasis.backup.restore import RestoreOptions
        from stasis.backup.restore import restore as restore_backup

        options = RestoreOptions(in_place=arguments.in_place, overwrite=arguments.overwrite, verify=arguments.verify)
        manifest = _resolve(arguments, repository, arguments.id)
        result = restore_backup(repository, manifest, target, options, reporter.progress)
        reporter.finish(result.as_dict(), _restored(result))


def _target(arguments: argparse.Namespace) -> str:
    given = [text for text in (arguments.target, arguments.output) if text is not None]
    if len(given) != 1:
        what = "no target is given" if not given else "the target is given twice"
        raise UsageError(what, hint="name one file or block device, or - for standard output")
    return str(given[0])


def _restore_to_stdout(arguments: argparse.Namespace) -> None:
    for name in ("in_place", "overwrite", "verify"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} makes no sense for a stream", hint="leave it out")
    if os.isatty(1):
        raise UsageError("a disk image is nothing for a terminal", hint="write it to a pipe or name a file")
    with _opened(arguments, sys.stderr) as (reporter, repository):
        from stasis.backup.restore import restore_to_stream

        try:
            manifest = _resolve(arguments, repository, arguments.id)
            result = restore_to_stream(repository, manifest, 1, reporter.progress)
        except BrokenPipeError as error:
            raise StasisError("whoever read the image ended before it was complete",
                              hint="see what the reader says", errno=error.errno or 0) from error
        reporter.finish(result.as_dict())


def apply(arguments: argparse.Namespace) -> None:
    """stasis backup apply"""
    with _opened(arguments) as (reporter, repository):
        from stasis.backup.restore import ApplyOptions
        from stasis.backup.restore import apply as apply_backup

        manifest = _resolve(arguments, repository, arguments.id)
        base = None if arguments.base is None else _resolve(arguments, repository, arguments.base)
        options = ApplyOptions(sample_share=arguments.sample / 100, sample_seed=arguments.sample_seed,
                               verify=arguments.verify)
        result = apply_backup(repository, manifest, arguments.target, base=base, options=options,
                              progress=reporter.progress)
        reporter.finish(result.as_dict(), _restored(result))


def _restored(result: RestoreResult) -> str:
    written, zeroed, kept = map(format_size, (result.bytes_written, result.bytes_zeroed, result.bytes_unchanged))
    first = (f"restored {result.backup[:8]} to {result.target} in {result.seconds:.1f} s: wrote {written}, "
             f"{zeroed} of zeroes, {kept} was there already")
    lines = [first]
    if result.position_at_start:
        lines.append(f"continued at {format_size(result.position_at_start)}, where an earlier run stopped")
    if result.chunks_sampled:
        lines.append(f"compared {result.chunks_sampled} chunks with the earlier backup first: equal")
    if result.bytes_verified:
        lines.append(f"read back {format_size(result.bytes_verified)}: equal")
    return "\n".join(lines)


def verify(arguments: argparse.Namespace) -> None:
    """stasis backup verify"""
    if arguments.live is None and (arguments.storage, arguments.limit) != (None, None):
        raise UsageError("--storage and --limit are for the snapshot that --live takes", hint="leave them out")
    with _opened(arguments) as (reporter, repository):
        manifest = _resolve(arguments, repository, arguments.id)
        if arguments.live is not None:
            _verify_live(arguments, repository, manifest, reporter)
            return
        from stasis.backup.restore import verify as verify_backup

        result = verify_backup(repository, manifest, reporter.progress)
        checked = f"read {format_size(result.bytes_checked)} in {result.seconds:.1f} s"
        reporter.finish(result.as_dict(), f"backup {manifest.id[:8]} is sound: {checked}")


def _verify_live(arguments: argparse.Namespace, repository: Repository, manifest: Manifest, reporter: Reporter) -> None:
    from stasis.daemon.sources import SnapshotStorage
    from stasis.daemon.verifying import verify_against

    result = verify_against(
        arguments.live, repository, manifest, read_data=arguments.read_data,
        storage=SnapshotStorage(arguments.storage or STORAGE, arguments.limit), progress=reporter.progress,
        run_dir=getattr(arguments, "run_dir", None), state_dir=getattr(arguments, "state_dir", None))
    reporter.finish(result.as_dict(), _compared(result))
    if result.bytes_differing:
        raise VerifyError(
            f"{arguments.live} differs from backup {result.backup[:12]} in {format_size(result.bytes_differing)}",
            hint="that is right if it was written to since, where stasis does not track its changes")


def _compared(result: VerifyResult) -> str:
    text = f"compared {format_size(result.bytes_compared)} in {result.seconds:.1f} s"
    if result.bytes_left_out:
        text += f", left out {format_size(result.bytes_left_out)} that changed since the backup"
    if not result.differing:
        return text + ": equal"
    lines = [f"  {format_size(length)} at {offset}" for offset, length in result.differing[:SHOWN_EXTENTS]]
    if len(result.differing) > SHOWN_EXTENTS:
        lines.append("  and more; --json lists them")
    return "\n".join([f"{text}, and these differ:", *lines])
