# SPDX-License-Identifier: Apache-2.0
"""Difference storage that lies above the node of a device of its snapshot, which must not be.

A write to the device would copy its old contents there, which is another write to the device, which waits for the
first one. Partitions, volumes and loop devices over the node are seen, and file systems on them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence

from stasis.errors import BusyError, StorageError
from stasis.live.stack import Stack

__all__ = ["refuse_above"]


def refuse_above(fd: int, nodes: Sequence[str], name: str) -> None:
    """StorageError with EBUSY if the storage is a device above one of the nodes, or lies on one."""
    numbers = [os.stat(node).st_rdev for node in nodes if os.path.exists(node)]
    if not numbers:
        return
    info = os.fstat(fd)
    mine = info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev
    # A file system that only another namespace can reach is none that we could have opened a storage on.
    with contextlib.suppress(BusyError), Stack(numbers) as above:
        if mine in above.levels or mine in {system.device for system in above.file_systems}:
            raise StorageError(f"{name} lies above a device of the snapshot", errno=errno.EBUSY,
                               hint="name a storage on another disk, or --storage memory")
