# SPDX-License-Identifier: Apache-2.0
"""`stasis backup`: the commands on backups, one file per kind of work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stasis.cli.backup import create, keep, keys, restore, run, serve, streams, upkeep
from stasis.cli.options import add_group

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(groups: Groups) -> None:
    """Add the group. What concerns a whole repository is offered here and in `stasis repo`."""
    group = add_group(groups, "backup", "Back up disks, and restore, read, check and expire backups.")
    for commands in (create, run, keep, restore, serve, streams, upkeep, keys):
        commands.add(group)
