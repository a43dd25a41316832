# SPDX-License-Identifier: Apache-2.0
"""blksnap v1 and v2, and stable-v1.0: everything on the control node, devices by number, storage handed over.

The events are those of `v5`; the directions in the numbers are the wrong way round here too. MOD, SETLOG and
GET_SECTOR_STATE are Veeam Agent 6's.
"""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint32, c_uint64

from stasis.blksnap.uapi.common import BLKSNAP, SnapshotEvent, Uuid, Version
from stasis.linux.ioctl import IOR, IOW

__all__ = [
    "CONTROL_NODE",
    "IOCTL_BLK_SNAP_GET_SECTOR_STATE",
    "IOCTL_BLK_SNAP_MOD",
    "IOCTL_BLK_SNAP_SETLOG",
    "IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE",
    "IOCTL_BLK_SNAP_SNAPSHOT_COLLECT",
    "IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES",
    "IOCTL_BLK_SNAP_SNAPSHOT_CREATE",
    "IOCTL_BLK_SNAP_SNAPSHOT_DESTROY",
    "IOCTL_BLK_SNAP_SNAPSHOT_TAKE",
    "IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT",
    "IOCTL_BLK_SNAP_TRACKER_COLLECT",
    "IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS",
    "IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP",
    "IOCTL_BLK_SNAP_TRACKER_REMOVE",
    "IOCTL_BLK_SNAP_VERSION",
    "BlkSnapDev",
    "CbtInfo",
    "ImageInfo",
    "SnapshotAppendStorage",
    "SnapshotCollect",
    "SnapshotCollectImages",
    "SnapshotCreate",
    "TrackerCollect",
    "TrackerMarkDirtyBlocks",
    "TrackerReadCbtBitmap",
]

CONTROL_NODE = "blksnap"


class BlkSnapDev(Structure):
    """struct blk_snap_dev: a device number."""

    _fields_ = [("mj", c_uint32), ("mn", c_uint32)]


class CbtInfo(Structure):
    """struct blk_snap_cbt_info; sizes in bytes."""

    _fields_ = [
        ("dev_id", BlkSnapDev),
        ("blk_size", c_uint32),
        ("device_capacity", c_uint64),
        ("blk_count", c_uint32),
        ("generation_id", Uuid),
        ("snap_number", c_uint8),
    ]


class TrackerCollect(Structure):
    """struct blk_snap_tracker_collect: the address of room for `count` CbtInfo."""

    _fields_ = [("count", c_uint32), ("cbt_info_array", c_uint64)]


class TrackerReadCbtBitmap(Structure):
    """struct blk_snap_tracker_read_cbt_bitmap; the call returns how many bytes it filled."""

    _fields_ = [("dev_id", BlkSnapDev), ("offset", c_uint32), ("length", c_uint32), ("buff", c_uint64)]


class TrackerMarkDirtyBlocks(Structure):
    """struct blk_snap_tracker_mark_dirty_blocks: the address of `count` ranges of sectors."""

    _fields_ = [("dev_id", BlkSnapDev), ("count", c_uint32), ("dirty_blocks_array", c_uint64)]


class SnapshotCreate(Structure):
    """struct blk_snap_snapshot_create: the address of `count` device numbers; the module fills in the id."""

    _fields_ = [("count", c_uint32), ("dev_id_array", c_uint64), ("id", Uuid)]


class SnapshotAppendStorage(Structure):
    """struct blk_snap_snapshot_append_storage: a device number, and `count` ranges of sectors on it."""

    _fields_ = [("id", Uuid), ("dev_id", BlkSnapDev), ("count", c_uint32), ("ranges", c_uint64)]


class SnapshotCollect(Structure):
    """struct blk_snap_snapshot_collect: the address of room for `count` UUIDs."""

    _fields_ = [("count", c_uint32), ("ids", c_uint64)]


class ImageInfo(Structure):
    """struct blk_snap_image_info: the numbers of an origin and of its image."""

    _fields_ = [("orig_dev_id", BlkSnapDev), ("image_dev_id", BlkSnapDev)]


class SnapshotCollectImages(Structure):
    """struct blk_snap_snapshot_collect_images: the address of room for `count` ImageInfo."""

    _fields_ = [("id", Uuid), ("count", c_uint32), ("image_info_array", c_uint64)]


IOCTL_BLK_SNAP_VERSION = IOW(BLKSNAP, 0, Version)
IOCTL_BLK_SNAP_TRACKER_REMOVE = IOW(BLKSNAP, 1, BlkSnapDev)
IOCTL_BLK_SNAP_TRACKER_COLLECT = IOW(BLKSNAP, 2, TrackerCollect)
IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP = IOR(BLKSNAP, 3, TrackerReadCbtBitmap)
IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS = IOR(BLKSNAP, 4, TrackerMarkDirtyBlocks)
IOCTL_BLK_SNAP_SNAPSHOT_CREATE = IOW(BLKSNAP, 5, SnapshotCreate)
IOCTL_BLK_SNAP_SNAPSHOT_DESTROY = IOR(BLKSNAP, 6, Uuid)
IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE = IOW(BLKSNAP, 7, SnapshotAppendStorage)
IOCTL_BLK_SNAP_SNAPSHOT_TAKE = IOR(BLKSNAP, 8, Uuid)
IOCTL_BLK_SNAP_SNAPSHOT_COLLECT = IOW(BLKSNAP, 9, SnapshotCollect)
IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES = IOW(BLKSNAP, 10, SnapshotCollectImages)
IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT = IOW(BLKSNAP, 11, SnapshotEvent)

IOCTL_BLK_SNAP_MOD = IOW(BLKSNAP, 32, 40)
IOCTL_BLK_SNAP_SETLOG = IOW(BLKSNAP, 33, 24)
IOCTL_BLK_SNAP_GET_SECTOR_STATE = IOW(BLKSNAP, 34, 24)
