# SPDX-License-Identifier: Apache-2.0
"""A file on btrfs at one instant, by a snapshot of the subvolume that it lies in.

For files that cannot be cloned, such as those without copy on write (chattr +C). The snapshot is removed as soon as the
file in it is open: btrfs keeps what is open until it is closed.
"""

from __future__ import annotations

import errno
import os
import secrets

from stasis.errors import StasisError
from stasis.linux import btrfs
from stasis.live import keeper
from stasis.live.keeper import Keeper
from stasis.live.ways import Point

__all__ = ["Subvolume", "undo"]

PREFIX = ".stasis-point-"
REASONS = {errno.ENOTTY: "it lies on no btrfs", errno.EXDEV: "the top of its subvolume is not mounted"}


class Subvolume:
    """A provider for regular files on btrfs."""

    name = "btrfs snapshot"

    def why_not(self, path: str) -> str:
        """Tries it."""
        try:
            point = self.take(path)
        except OSError as error:
            return REASONS.get(error.errno or 0) or str(error.strerror or error)
        except StasisError as error:
            return error.message
        return point.close()

    def take(self, path: str) -> Point:
        """A descriptor of the file in a snapshot that is gone already. Raises OSError, StasisError."""
        top = btrfs.subvolume_of(path)
        inside = os.path.relpath(os.path.realpath(path), top)
        _clear(top)
        name = f"{PREFIX}{keeper.owner()}-{secrets.token_hex(4)}"
        with_keeper = Keeper(__name__, top=top, name=name)
        try:
            btrfs.snapshot(top, name)
            fd = os.open(os.path.join(top, name, inside), os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            with_keeper.close()
            raise
        if left := with_keeper.close():
            os.close(fd)
            raise StasisError(f"the snapshot {top}/{name} cannot be removed: {left}",
                              hint=f"btrfs subvolume delete {top}/{name}")
        return Point(fd)


def _clear(top: str) -> None:
    """Remove snapshots whose makers were killed together with their keepers."""
    for entry in os.listdir(top):
        if entry.startswith(PREFIX) and keeper.is_abandoned(entry):
            undo(top, entry)


def undo(top: str, name: str) -> str:
    """Remove a snapshot if it is there; why that cannot be."""
    try:
        btrfs.remove_subvolume(top, name)
    except OSError as error:
        return "" if error.errno == errno.ENOENT else str(error.strerror or error)
    return ""
