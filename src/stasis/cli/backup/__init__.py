# SPDX-License-Identifier: Apache-2.0
"""`stasis backup`: the commands on backups, one file per kind of work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from stasis.cli.options import add_group

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["COMMANDS", "add"]

FILES = {
    "create": ("create",),
    "run": ("run",),
    "keep": ("list", "show", "forget", "tag", "copy"),
    "restore": ("restore", "apply", "verify"),
    "serve": ("serve", "mount", "umount", "diff"),
    "streams": ("send", "receive", "export", "import"),
    "upkeep": ("prune", "check", "stats", "unlock"),
    "keys": ("key",),
}
COMMANDS = {command: file for file, commands in FILES.items() for command in commands}
"""The file of each command, so that only that is loaded: a backup's start is waited for."""


def add(groups: Groups, command: str = "") -> None:
    """Add the group with all commands, or those of the file of one. What concerns a whole repository is offered here
    and in `stasis repo`."""
    group = add_group(groups, "backup", "Back up disks, and restore, read, check and expire backups.")
    for name in [COMMANDS[command]] if command else FILES:
        importlib.import_module(f"stasis.cli.backup.{name}").add(group)
