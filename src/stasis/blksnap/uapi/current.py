# SPDX-License-Identifier: Apache-2.0
"""blksnap as of its patch set for Linux 6.15: filters with options on the block device, storage by path."""

from __future__ import annotations

from ctypes import Structure, c_char, c_uint32, c_uint64
from enum import IntEnum

from stasis.blksnap.uapi.common import (
    BLKFILTER_NAME_LENGTH,
    BLKSNAP,
    FILTER,
    FilterCtl,
    FilterName,
    SnapshotCollect,
    SnapshotEvent,
    Uuid,
    Version,
)
from stasis.linux.ioctl import IOR, IOW, IOWR

__all__ = [
    "BLKFILTER_ATTACH",
    "BLKFILTER_CTL",
    "BLKFILTER_DETACH",
    "CONTROL_NODE",
    "IOCTL_BLKSNAP_SNAPSHOT_COLLECT",
    "IOCTL_BLKSNAP_SNAPSHOT_CREATE",
    "IOCTL_BLKSNAP_SNAPSHOT_DESTROY",
    "IOCTL_BLKSNAP_SNAPSHOT_TAKE",
    "IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT",
    "IOCTL_BLKSNAP_VERSION",
    "Command",
    "EventCode",
    "FilterAttach",
    "SnapshotCreate",
]

CONTROL_NODE = "blksnap-control"


class FilterAttach(Structure):
    """struct blkfilter_attach; opt is the address of optlen bytes of options, of which blksnap has none."""

    _fields_ = [("name", c_char * BLKFILTER_NAME_LENGTH), ("opt", c_uint64), ("optlen", c_uint32)]


class SnapshotCreate(Structure):
    """struct blksnap_snapshot_create from v7 on: limit in sectors, address of the path; the module fills in the id."""

    _fields_ = [("diff_storage_limit_sect", c_uint64), ("diff_storage_filename", c_uint64), ("id", Uuid)]


class Command(IntEnum):
    """Commands of BLKFILTER_CTL, with the structure of each in `common`: enum blkfilter_ctl_blksnap."""

    CBTINFO = 0
    CBTMAP = 1
    CBTDIRTY = 2
    SNAPSHOTADD = 3
    SNAPSHOTINFO = 4


class EventCode(IntEnum):
    """enum blksnap_event_codes."""

    CORRUPTED = 0
    NO_SPACE = 1


BLKFILTER_ATTACH = IOWR(FILTER, 142, FilterAttach)
BLKFILTER_DETACH = IOWR(FILTER, 143, FilterName)
BLKFILTER_CTL = IOWR(FILTER, 144, FilterCtl)

IOCTL_BLKSNAP_VERSION = IOR(BLKSNAP, 0, Version)
IOCTL_BLKSNAP_SNAPSHOT_CREATE = IOWR(BLKSNAP, 1, SnapshotCreate)
IOCTL_BLKSNAP_SNAPSHOT_DESTROY = IOW(BLKSNAP, 2, Uuid)
IOCTL_BLKSNAP_SNAPSHOT_TAKE = IOW(BLKSNAP, 3, Uuid)
# These two read their argument as well, whatever their direction says.
IOCTL_BLKSNAP_SNAPSHOT_COLLECT = IOR(BLKSNAP, 4, SnapshotCollect)
IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT = IOR(BLKSNAP, 5, SnapshotEvent)
