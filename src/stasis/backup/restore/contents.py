# SPDX-License-Identifier: Apache-2.0
"""Looking before overwriting: what a target holds, and whether a restore may go over it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from stasis.backup.restore import signatures
from stasis.backup.restore.compare import PIECE_BYTES, nonzero_runs
from stasis.block.copy.target import Target
from stasis.errors import BusyError, StorageError
from stasis.linux import blockdev
from stasis.linux.iobuffer import IoBuffer
from stasis.units import format_size

__all__ = ["is_empty", "refuse_contents"]


def is_empty(target: Target) -> bool:
    """Whether the target is a file without a byte in it."""
    return not target.is_block_device and not os.fstat(target.descriptor).st_size


def refuse_contents(target: Target, size: int, *, in_place: bool) -> None:
    """Refuse a target that holds what somebody may want to keep, and a file that is smaller than `size`.

    Any data in a file counts, unless the restore is meant to go over it, in place. Raises BusyError, StorageError.
    """
    room = blockdev.size(target.descriptor)
    if not room:
        return
    if found := signatures.probe(target.descriptor, room):
        raise _holds(target.path, found[0])
    if target.is_block_device:
        return
    if not in_place and _holds_data(target, room):
        raise _holds(target.path, "data")
    if room < size:
        raise StorageError(f"{target.path} is too small: it has {room} bytes ({format_size(room)}), the backup has "
                           f"{size}", hint="choose another name, or give --overwrite", errno=errno.ENOSPC)


def _holds(path: Path, what: str) -> BusyError:
    return BusyError(f"{path} holds {what}; nothing was written",
                     hint="choose another target, or give --overwrite if nothing in it is needed any more")


def _holds_data(target: Target, room: int) -> bool:
    with IoBuffer(PIECE_BYTES) as buffer:
        return any(nonzero_runs(target.descriptor, 0, room, buffer, sparse=True))
