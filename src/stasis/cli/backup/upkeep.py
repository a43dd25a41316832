# SPDX-License-Identifier: Apache-2.0
"""`prune`, `check`, `stats` and `unlock`, in `stasis repo` and in `stasis backup`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.backup.options import add_repository, open_repository
from stasis.cli.backup.reporting import report
from stasis.cli.options import Parser, add_command, seconds
from stasis.errors import DamagedError, UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.keep.check import CheckResult
    from stasis.backup.keep.prune import PruneResult
    from stasis.backup.keep.stats import Stats
    from stasis.cli.options import Groups

__all__ = ["add", "add_wait", "prune_text"]


def add(group: Groups) -> None:
    """Add the commands."""
    command = add_command(group, "prune", prune, "Delete what no backup needs.",
                          "stasis repo prune --repo /srv/backup --wait 600")
    command.add_argument("--dry-run", action="store_true", help="only count what would be deleted")
    add_wait(command)
    add_repository(command)
    _add_check(group)
    add_repository(add_command(group, "stats", stats, "Count backups, and the room they take.",
                               "stasis repo stats --repo /srv/backup"))
    command = add_command(group, "unlock", unlock, "Remove locks of commands that are gone.",
                          "stasis repo unlock --repo /srv/backup")
    command.add_argument("--all", action="store_true",
                         help="all locks: nobody may be using the repository, or it can lose backups being made")
    add_repository(command)


def _add_check(group: Groups) -> None:
    command = add_command(group, "check", check, "Look whether all is there and whole.", """
stasis repo check --repo /srv/backup
stasis repo check --repo /srv/backup --read-data-subset 5%""")
    command.add_argument("--read-data", action="store_true", help="read all data, not only indexes and listings")
    command.add_argument("--read-data-subset", metavar="PERCENT", type=_percentage,
                         help="read this share of the data, drawn at random")
    command.add_argument("--seed", metavar="N", type=int, help="draw the share that an earlier check named")
    add_wait(command)
    add_repository(command)


def add_wait(command: Parser) -> None:
    """--wait"""
    command.add_argument("--wait", metavar="SECONDS", type=seconds, default=0.0,
                         help="wait this long for others who use the repository (0)")


def _percentage(text: str) -> float:
    try:
        value = float(text.rstrip("%"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no percentage", hint="write a number from 0 to 100, as in 5%") from error
    if not 0 < value <= 100:
        raise UsageError(f"{text!r} is no share of the data", hint="write a number above 0 and up to 100, as in 5%")
    return value


def prune(arguments: argparse.Namespace) -> None:
    """stasis repo prune"""
    from stasis.backup.keep.prune import prune as prune_repository

    with open_repository(arguments, read_only=arguments.dry_run) as repository, report(arguments) as reporter:
        result = prune_repository(repository, dry_run=arguments.dry_run, wait=arguments.wait,
                                  progress=reporter.progress)
        reporter.finish(result.as_dict(), prune_text(result))


def prune_text(result: PruneResult) -> str:
    """What was deleted, in a sentence."""
    would = "would delete" if result.dry_run else "deleted"
    text = (f"{would} {result.chunks_removed} chunks, {result.segments_removed} index segments and "
            f"{result.leftovers_removed} leftovers: {format_size(result.bytes_removed)}; kept {result.chunks_kept} "
            f"chunks of {format_size(result.bytes_kept)} for {result.backups} backups")
    return text + (f"; spared {result.spared} that are new" if result.spared else "")


def check(arguments: argparse.Namespace) -> None:
    """stasis repo check"""
    from stasis.backup.keep.check import check as check_repository

    if arguments.read_data and arguments.read_data_subset is not None:
        raise UsageError("--read-data reads all data, --read-data-subset a part", hint="give one of them")
    share = 1.0 if arguments.read_data else (arguments.read_data_subset or 0.0) / 100
    with open_repository(arguments, read_only=True) as repository:
        with report(arguments) as reporter:
            result = check_repository(repository, read_share=share, seed=arguments.seed, wait=arguments.wait,
                                      progress=reporter.progress)
            reporter.finish(result.as_dict(), _check_text(result))
        if result.problems:
            raise _damage(result, repository.url)


def _check_text(result: CheckResult) -> str:
    lines = [f"{result.backups} backups, {result.segments} index segments, {result.chunks} chunks"]
    if result.chunks_read:
        lines.append(f"read {result.chunks_read} chunks, {format_size(result.bytes_read)}")
    if result.seed is not None:
        lines.append(f"drawn with --seed {result.seed}")
    if result.garbage_objects:
        lines.append(f"{result.garbage_objects} objects of {format_size(result.garbage_bytes)} that no backup needs: "
                     "prune deletes them")
    lines += [f"{name} is none of ours" for name in result.unknown[:20]]
    if result.damaged_backups:
        lines.append("damaged backups: " + " ".join(id_[:12] for id_ in result.damaged_backups))
    return "\n".join(lines if result.problems else [*lines, "nothing is wrong"])


def _damage(result: CheckResult, url: str) -> DamagedError:
    objects, backups = len(result.problems), len(result.damaged_backups)
    return DamagedError(
        f"{objects} object{'s' * (objects != 1)} of the repository {url} {'is' if objects == 1 else 'are'} damaged or "
        f"missing, and {backups} backup{'s' * (backups != 1)} with it",
        hint="bring the objects back from a copy of the repository, or forget those backups, prune, and make new ones")


def stats(arguments: argparse.Namespace) -> None:
    """stasis repo stats"""
    from stasis.backup.keep.stats import stats as repository_stats

    with open_repository(arguments, read_only=True) as repository:
        result = repository_stats(repository)
    if arguments.json:
        output.print_json(result.as_dict())
    else:
        output.print_fields(_stats_fields(result))


def _stats_fields(result: Stats) -> list[tuple[str, object]]:
    return [
        ("backups", result.backups), ("devices", result.devices), ("hosts", result.hosts),
        ("oldest", result.oldest), ("newest", result.newest),
        ("protected", format_size(result.bytes_protected)), ("stored", format_size(result.bytes_stored)),
        ("ratio", result.ratio), ("chunks", f"{result.chunks} of up to {format_size(result.chunk_size)}"),
        ("compression", result.compression), ("encrypted", "yes" if result.encrypted else "no"),
    ]


def unlock(arguments: argparse.Namespace) -> None:
    """stasis repo unlock"""
    with open_repository(arguments) as repository:
        removed = repository.unlock(stale_only=not arguments.all)
        left = repository.locks()
    if arguments.json:
        output.print_json({"removed": removed, "left": left})
        return
    for lock in removed:
        print(f"removed the lock of {lock.sentence()}")
    for lock in left:
        print(f"kept the lock of {lock.sentence()}, refreshed {lock.age:.0f} s ago")
