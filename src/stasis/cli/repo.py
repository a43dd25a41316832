# SPDX-License-Identifier: Apache-2.0
"""`stasis repo`: make a repository and keep it in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stasis.cli.backup import init, keys, upkeep
from stasis.cli.options import add_group

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(groups: Groups) -> None:
    """Add the group."""
    group = add_group(groups, "repo", "Make a repository of backups and keep it in order.")
    for commands in (init, upkeep, keys):
        commands.add(group)
