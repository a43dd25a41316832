# SPDX-License-Identifier: Apache-2.0
"""What the generations of blksnap's interface share."""

from __future__ import annotations

import uuid
from ctypes import Structure, c_char, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

__all__ = [
    "BLKFILTER_NAME_LENGTH",
    "BLKSNAP",
    "BLKSNAP_EVENT_DATA_SIZE",
    "BLKSNAP_IMAGE_NAME_LEN",
    "FILTER",
    "SECTOR",
    "CbtDirty",
    "CbtInfo",
    "CbtMap",
    "EventCorrupted",
    "EventSpace",
    "FilterCtl",
    "FilterName",
    "Sectors",
    "SnapshotAdd",
    "SnapshotCollect",
    "SnapshotEvent",
    "SnapshotInfo",
    "Uuid",
    "Version",
]

SECTOR = 512
"""Bytes of a sector, wherever a structure counts sectors."""

FILTER = 0x12
"""Type of the requests on a block device: the range of linux/fs.h."""
BLKSNAP = "V"
"""Type of the requests on the control node."""

BLKFILTER_NAME_LENGTH = 32
BLKSNAP_IMAGE_NAME_LEN = 32
BLKSNAP_EVENT_DATA_SIZE = 4064


class Uuid(Structure):
    """struct blksnap_uuid: 16 bytes in the order of the text."""

    _fields_ = [("b", c_uint8 * 16)]

    @classmethod
    def of(cls, text: str) -> Uuid:
        """From 8-4-4-4-12 hex digits. ValueError."""
        return cls.from_buffer_copy(uuid.UUID(text).bytes)

    def __str__(self) -> str:
        return str(uuid.UUID(bytes=bytes(self)))


class FilterName(Structure):
    """struct blkfilter_name (to v7), struct blkfilter_detach (6.15)."""

    _fields_ = [("name", c_char * BLKFILTER_NAME_LENGTH)]


class FilterCtl(Structure):
    """struct blkfilter_ctl; opt is the address of the command's own structure of optlen bytes."""

    _fields_ = [
        ("name", c_char * BLKFILTER_NAME_LENGTH),
        ("cmd", c_uint32),
        ("optlen", c_uint32),
        ("opt", c_uint64),
    ]


class CbtInfo(Structure):
    """struct blksnap_cbtinfo; capacity and block size in bytes."""

    _fields_ = [
        ("device_capacity", c_uint64),
        ("block_size", c_uint32),
        ("block_count", c_uint32),
        ("generation_id", Uuid),
        ("changes_number", c_uint8),
    ]


class CbtMap(Structure):
    """struct blksnap_cbtmap: offset and length in blocks, the address of the buffer."""

    _fields_ = [("offset", c_uint32), ("length", c_uint32), ("buffer", c_uint64)]


class Sectors(Structure):
    """struct blksnap_sectors: a range in sectors."""

    _fields_ = [("offset", c_uint64), ("count", c_uint64)]


class CbtDirty(Structure):
    """struct blksnap_cbtdirty: the address of `count` ranges."""

    _fields_ = [("count", c_uint32), ("dirty_sectors", c_uint64)]


class SnapshotAdd(Structure):
    """struct blksnap_snapshotadd."""

    _fields_ = [("id", Uuid)]


class SnapshotInfo(Structure):
    """struct blksnap_snapshotinfo: 0 or a negative errno, and the name of the image's disk."""

    _fields_ = [("error_code", c_int32), ("image", c_char * BLKSNAP_IMAGE_NAME_LEN)]


class Version(Structure):
    """struct blksnap_version."""

    _fields_ = [("major", c_uint16), ("minor", c_uint16), ("revision", c_uint16), ("build", c_uint16)]

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.revision}.{self.build}"


class SnapshotCollect(Structure):
    """struct blksnap_snapshot_collect: the address of room for `count` UUIDs."""

    _fields_ = [("count", c_uint32), ("ids", c_uint64)]


class SnapshotEvent(Structure):
    """struct blksnap_snapshot_event; the time is the monotonic clock in nanoseconds."""

    _fields_ = [
        ("id", Uuid),
        ("timeout_ms", c_uint32),
        ("code", c_uint32),
        ("time_label", c_int64),
        ("data", c_uint8 * BLKSNAP_EVENT_DATA_SIZE),
    ]


class EventCorrupted(Structure):
    """struct blksnap_event_corrupted: device number, and a positive errno."""

    _fields_ = [("dev_id_mj", c_uint32), ("dev_id_mn", c_uint32), ("err_code", c_int32)]


class EventSpace(Structure):
    """struct blksnap_event_no_space (6.15), struct blksnap_event_low_free_space (to v5)."""

    _fields_ = [("requested_nr_sect", c_uint64)]
