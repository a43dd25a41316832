# SPDX-License-Identifier: Apache-2.0
"""`stasis backup forget`: expire backups by id or by rules."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from stasis.cli import output
from stasis.cli.backup import upkeep
from stasis.cli.backup.options import add_repository, open_repository
from stasis.cli.backup.reporting import report
from stasis.cli.backup.selecting import add_selection, selection_of, tag_list
from stasis.cli.options import add_command
from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.backup.keep.forget import ForgetGroup
    from stasis.backup.keep.policy import KeepPolicy
    from stasis.backup.repo import Repository
    from stasis.cli.options import Groups, Parser

__all__ = ["add"]

COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def add(group: Groups) -> None:
    """Add the command."""
    command = add_command(group, "forget", forget, "Forget backups by id, or all that no rule keeps.", """
stasis backup forget --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --prune
stasis backup forget --keep-within 30d --keep-tag keep --dry-run
stasis backup forget 6f1c2a7e""")
    command.add_argument("id", metavar="ID", nargs="*", help="forget these, whatever rules say")
    _add_rules(command)
    command.add_argument("--group-by", metavar="FIELD[,FIELD]", default="host,device",
                         help="apply the rules to each group alone: host, device, tags, set, or '' (host,device)")
    command.add_argument("--dry-run", action="store_true", help="only show what would be forgotten")
    command.add_argument("--prune", action="store_true", help="then delete what no backup needs any more")
    upkeep.add_wait(command)
    add_selection(command)
    add_repository(command)


def _add_rules(command: Parser) -> None:
    what = {"last": "the last N backups"}
    for rule in COUNTED:
        span = {"hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months", "yearly": "years"}.get(rule)
        command.add_argument(f"--keep-{rule}", metavar="N", type=_count, default=0,
                             help="keep " + what.get(rule, f"the newest backup of each of the last N {span} that "
                                                           f"have one") + "; or 'all'")
    command.add_argument("--keep-within", metavar="DURATION", type=_duration,
                         help="keep what is at most this much older than the newest, as in 1y6m, 2w or 7d12h")
    command.add_argument("--keep-tag", metavar="TAG[,TAG]", type=tag_list, action="append", default=[],
                         help="keep what has all these tags; may be given more than once")


def _count(text: str) -> int:
    if text == "all":
        return -1
    if not text.isdecimal():
        raise UsageError(f"{text!r} is no number of backups", hint="write a number, or all")
    return int(text)


def _duration(text: str) -> Any:
    from stasis.backup.keep.policy import Duration

    return Duration.parse(text)


def policy_of(arguments: argparse.Namespace) -> KeepPolicy:
    """The rules that are given."""
    from stasis.backup.keep.policy import KeepPolicy

    counts = {rule: getattr(arguments, f"keep_{rule}") for rule in COUNTED}
    return KeepPolicy(**counts, within=arguments.keep_within,
                      tags=tuple(frozenset(tags) for tags in arguments.keep_tag if tags))


def forget(arguments: argparse.Namespace) -> None:
    """stasis backup forget"""
    with open_repository(arguments) as repository, report(arguments) as reporter:
        groups = _forget(repository, arguments)
        if not arguments.json:
            _print(groups, arguments.dry_run)
        fields: dict[str, Any] = {"dry_run": arguments.dry_run, "groups": groups,
                                  "forgotten": [id_ for group in groups for id_ in group["forget"]]}
        text = ""
        if arguments.prune and not arguments.dry_run:
            from stasis.backup.keep.prune import prune

            result = prune(repository, wait=arguments.wait, progress=reporter.progress)
            fields["prune"] = result.as_dict()
            text = upkeep.prune_text(result)
        reporter.finish(fields, text)


def _forget(repository: Repository, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from stasis.backup.keep.forget import forget_by_policy, forget_ids

    policy = policy_of(arguments)
    if arguments.id:
        if not policy.is_empty:
            raise UsageError("backups are named, and rules are given", hint="give ids or --keep options, not both")
        return [{"group": {}, "keep": [], "forget": forget_ids(repository, arguments.id, dry_run=arguments.dry_run)}]
    by = [name.strip() for name in arguments.group_by.split(",") if name.strip()]
    groups: list[ForgetGroup] = forget_by_policy(repository, policy, selection_of(arguments), by,
                                                 dry_run=arguments.dry_run)
    return [group.as_dict() for group in groups]


def _print(groups: list[dict[str, Any]], dry_run: bool) -> None:
    for group in groups:
        title = ", ".join(f"{name} {value}" for name, value in group["group"].items()) or "backups"
        forgotten = f"{len(group['forget'])} {'would be ' if dry_run else ''}forgotten"
        print(f"{title}: {len(group['keep'])} kept, {forgotten}")
        rows = [(each["id"][:12], each["time"][:19].replace("T", " "), ", ".join(each["reasons"]))
                for each in group["keep"]]
        output.print_table(("KEPT", "TIME", "BECAUSE"), rows)
        for id_ in group["forget"]:
            print(f"{'would forget' if dry_run else 'forgot'} {id_[:12]}")
