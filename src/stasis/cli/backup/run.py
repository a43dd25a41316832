# SPDX-License-Identifier: Apache-2.0
"""`stasis backup run`: back up the sets of the configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli.backup.reporting import report
from stasis.cli.options import add_command
from stasis.errors import UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.daemon.runs import SetResult

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the command."""
    command = add_command(group, "run", run, "Back up the sets of a configuration, forget old backups and prune.", """
stasis backup run
stasis backup run nightly --dry-run
stasis backup run --schedule hourly
""")
    command.add_argument("sets", metavar="SET", nargs="*", help="the sets to back up; all of them if none is named")
    command.add_argument("--schedule", metavar="NAME", help="back up the sets that have this schedule")
    command.add_argument("--config", metavar="FILE", type=Path, default=Path("/etc/stasis/backup.toml"),
                         help="the configuration (/etc/stasis/backup.toml)")
    command.add_argument("--dry-run", action="store_true", help="only tell what would be read and forgotten")


def run(arguments: argparse.Namespace) -> int:
    """stasis backup run"""
    if arguments.sets and arguments.schedule is not None:
        raise UsageError("sets are named and a schedule too", hint="name one or the other")
    with report(arguments) as reporter:
        from stasis.backup.config import load
        from stasis.daemon.runs import run_sets, worst

        chosen = load(arguments.config).choose(tuple(arguments.sets), arguments.schedule)
        results = run_sets(chosen, reporter.progress, dry_run=arguments.dry_run,
                           run_dir=getattr(arguments, "run_dir", None), state_dir=getattr(arguments, "state_dir", None))
        for result in results:
            for warning in result.warnings:
                reporter.warn(f"{result.name}: {warning}")
        code = worst(results)
        fields = {"dry_run": arguments.dry_run, "sets": [result.as_dict() for result in results], "exit_code": code}
        reporter.finish(fields, "\n".join(_lines(results)))
    return code


def _lines(results: Sequence[SetResult]) -> list[str]:
    lines = []
    for result in results:
        for backup in result.created.backups if result.created else ():
            stored = format_size(backup.statistics["bytes_stored"])
            lines.append(f"{result.name}: {backup.id[:8]}  {backup.device}: {backup.kind}, stored {stored}")
        for plan in result.plans:
            read = "an unknown length" if plan.bytes_to_read is None else format_size(plan.bytes_to_read)
            lines.append(f"{result.name}: {plan.device}: {plan.kind}, would read {read}")
        if result.forgotten:
            lines.append(f"{result.name}: {'forgot' if result.created else 'would forget'} {len(result.forgotten)}")
        if result.bytes_pruned:
            lines.append(f"{result.name}: pruned {format_size(result.bytes_pruned)}")
        if result.error is not None:
            lines.append(f"{result.name}: failed")
    return lines
