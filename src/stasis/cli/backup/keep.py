# SPDX-License-Identifier: Apache-2.0
"""`stasis backup list`, `show`, `tag` and `copy`; `forget` has a file of its own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.backup import forget
from stasis.cli.backup.options import add_latest, add_repository, ask, open_repository
from stasis.cli.backup.reporting import report
from stasis.cli.backup.selecting import add_selection, describe, selection_of, tag_list
from stasis.cli.options import add_command, seconds
from stasis.errors import DamagedError, UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.keep.copy import CopiedBackup
    from stasis.backup.repo import Manifest, Repository, Secrets
    from stasis.cli.options import Groups

__all__ = ["add"]

SHORT_ID = 12


def add(group: Groups) -> None:
    """Add the commands."""
    command = add_command(group, "list", list_backups, "List backups, the oldest first.", """
stasis backup list --repo /srv/backup
stasis backup list --repo /srv/backup --host web1 --device vda --json""")
    add_selection(command)
    add_repository(command)
    command = add_command(group, "show", show, "Show all about one backup.", "stasis backup show latest --device vda")
    command.add_argument("id", metavar="ID", help="the backup, the start of its id, or latest")
    add_latest(command)
    add_repository(command)
    forget.add(group)
    _add_tag(group)
    _add_copy(group)


def _add_tag(group: Groups) -> None:
    command = add_command(group, "tag", tag, "Change the tags of backups.", """
stasis backup tag 6f1c2a7e --add before-upgrade
stasis backup tag 6f1c2a7e --set weekly,offsite""")
    command.add_argument("id", metavar="ID", nargs="+", help="the backup, the start of its id, or latest")
    command.add_argument("--add", metavar="TAG", type=tag_list, action="extend", default=[], help="add tags")
    command.add_argument("--remove", metavar="TAG", type=tag_list, action="extend", default=[], help="remove tags")
    command.add_argument("--set", metavar="TAG", type=tag_list, help="have these tags and no others; '' for none")
    add_repository(command)


def _add_copy(group: Groups) -> None:
    command = add_command(group, "copy", copy, "Copy backups to another repository.", """
stasis backup copy latest --device vda --repo /srv/backup --to s3://offsite/backup
stasis backup copy --host web1 --to /mnt/usb/backup""")
    command.add_argument("id", metavar="ID", nargs="*", help="what to copy; all that fit the options below if left out")
    command.add_argument("--to", metavar="URL", required=True, help="the repository to copy to")
    command.add_argument("--to-key-file", metavar="FILE",
                         help="open that with the content of FILE instead of a passphrase (STASIS_TO_PASSPHRASE, "
                              "STASIS_TO_PASSPHRASE_FILE, STASIS_TO_PASSPHRASE_COMMAND, or a prompt)")
    command.add_argument("--wait", metavar="SECONDS", type=seconds, default=0.0,
                         help="wait this long for a prune to end (0)")
    add_selection(command)
    add_repository(command)


def list_backups(arguments: argparse.Namespace) -> None:
    """stasis backup list"""
    damaged: list[DamagedError] = []
    selection = selection_of(arguments)
    with open_repository(arguments, read_only=True) as repository:
        _print_list([one for one in repository.backups(damaged.append) if selection.fits(one)], as_json=arguments.json)
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise DamagedError(f"not all backups are listed: {damaged[0].message}{more}", hint=damaged[0].hint)


def _print_list(backups: Sequence[Manifest], *, as_json: bool) -> None:
    if as_json:
        output.print_json([describe(backup) for backup in backups])
        return
    output.print_table(("ID", "TIME", "HOST", "DEVICE", "SIZE", "KIND", "STORED", "SET", "TAGS"), [
        (backup.id[:SHORT_ID], backup.time[:19].replace("T", " "), backup.host, backup.device,
         format_size(backup.size), backup.kind, output.size_text(backup.statistics.get("bytes_stored")),
         backup.set_id[:8], ",".join(backup.tags)) for backup in backups])


def show(arguments: argparse.Namespace) -> None:
    """stasis backup show"""
    with open_repository(arguments, read_only=True) as repository:
        backup = repository.resolve(arguments.id, host=arguments.host, device=arguments.device)
    if arguments.json:
        output.print_json(describe(backup))
        return
    fields = describe(backup)
    statistics = fields.pop("statistics")
    fields["size"] = format_size(backup.size)
    fields["chunk_size"] = format_size(backup.chunk_size)
    fields["tags"] = ",".join(backup.tags)
    output.print_fields([(name, value) for name, value in {**fields, **statistics}.items() if value not in (None, "")])


def tag(arguments: argparse.Namespace) -> None:
    """stasis backup tag"""
    if arguments.set is not None and (arguments.add or arguments.remove):
        raise UsageError("--set goes with neither --add nor --remove", hint="--set names all tags")
    if arguments.set is None and not arguments.add and not arguments.remove:
        raise UsageError("no tag is named", hint="give --add, --remove or --set")
    with open_repository(arguments) as repository:
        backups = [repository.resolve(id_) for id_ in arguments.id]
        tagged = [backup.with_tags(_new_tags(backup.tags, arguments)) for backup in backups]
        for backup in tagged:
            repository.set_tags(backup.id, backup.tags)
    if arguments.json:
        output.print_json([describe(backup) for backup in tagged])
    else:
        for backup in tagged:
            print(f"{backup.id[:SHORT_ID]}: {','.join(backup.tags) or 'no tags'}")


def _new_tags(tags: Iterable[str], arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.set is not None:
        return tuple(sorted(set(arguments.set)))
    return tuple(sorted((set(tags) | set(arguments.add)) - set(arguments.remove)))


def copy(arguments: argparse.Namespace) -> None:
    """stasis backup copy"""
    from stasis.backup.keep.copy import copy as copy_backups

    with report(arguments) as reporter, open_repository(arguments) as source, _open_target(arguments) as target:
        copied = []
        for one in copy_backups(source, _chosen(source, arguments), target, wait=arguments.wait,
                                progress=reporter.progress):
            copied.append(one)
            reporter.say(_copied_text(one))
        reporter.finish({"copied": [one.as_dict() for one in copied]})


def _copied_text(one: CopiedBackup) -> str:
    if one.skipped:
        return f"{one.source[:SHORT_ID]}: there already as {one.id[:SHORT_ID]}"
    return (f"{one.source[:SHORT_ID]}: copied as {one.id[:SHORT_ID]}, {format_size(one.bytes_read)} read, "
            f"{format_size(one.bytes_stored)} stored")


def _chosen(repository: Repository, arguments: argparse.Namespace) -> list[Manifest]:
    from stasis.backup.keep.forget import select

    if arguments.id:
        return [repository.resolve(id_, host=arguments.host, device=arguments.device) for id_ in arguments.id]
    return select(repository, selection_of(arguments))


def _open_target(arguments: argparse.Namespace) -> Repository:
    from stasis.backup.repo import Repository

    return Repository.open(arguments.to, _target_secrets(arguments))


def _target_secrets(arguments: argparse.Namespace) -> Secrets:
    import sys

    from stasis.backup.repo import Secrets

    names = ("PASSPHRASE", "PASSPHRASE_FILE", "PASSPHRASE_COMMAND")
    environment = {f"STASIS_{name}": os.environ[f"STASIS_TO_{name}"] for name in names
                   if f"STASIS_TO_{name}" in os.environ}
    return Secrets.from_environment(arguments.to_key_file, ask if sys.stdin.isatty() else None, environment)
