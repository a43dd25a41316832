# SPDX-License-Identifier: Apache-2.0
"""blksnap v3 to v5: filters on the block device, storage as ranges of sectors that user space hands over.

The directions in the numbers of the control node are the wrong way round. v3 and v4 name the storage's device by its
number where v5 takes a path; the structure below is v5's. The filter requests are those of `v7`.
"""

from __future__ import annotations

from ctypes import Structure, c_uint32, c_uint64
from enum import IntEnum

from stasis.blksnap.uapi.common import BLKSNAP, SnapshotCollect, SnapshotEvent, Uuid, Version
from stasis.linux.ioctl import IOR, IOW

__all__ = [
    "IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE",
    "IOCTL_BLKSNAP_SNAPSHOT_COLLECT",
    "IOCTL_BLKSNAP_SNAPSHOT_CREATE",
    "IOCTL_BLKSNAP_SNAPSHOT_DESTROY",
    "IOCTL_BLKSNAP_SNAPSHOT_TAKE",
    "IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT",
    "IOCTL_BLKSNAP_VERSION",
    "EventCode",
    "SnapshotAppendStorage",
]


class SnapshotAppendStorage(Structure):
    """struct blksnap_snapshot_append_storage of v5: path of a block device, and `count` ranges of sectors on it."""

    _fields_ = [
        ("id", Uuid),
        ("bdev_path", c_uint64),
        ("bdev_path_size", c_uint32),
        ("count", c_uint32),
        ("ranges", c_uint64),
    ]


class EventCode(IntEnum):
    """enum blksnap_event_codes to v5."""

    LOW_FREE_SPACE = 0
    CORRUPTED = 1


IOCTL_BLKSNAP_VERSION = IOW(BLKSNAP, 0, Version)
IOCTL_BLKSNAP_SNAPSHOT_CREATE = IOW(BLKSNAP, 1, Uuid)
IOCTL_BLKSNAP_SNAPSHOT_DESTROY = IOR(BLKSNAP, 2, Uuid)
IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE = IOW(BLKSNAP, 3, SnapshotAppendStorage)
IOCTL_BLKSNAP_SNAPSHOT_TAKE = IOR(BLKSNAP, 4, Uuid)
IOCTL_BLKSNAP_SNAPSHOT_COLLECT = IOW(BLKSNAP, 5, SnapshotCollect)
IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT = IOW(BLKSNAP, 6, SnapshotEvent)
