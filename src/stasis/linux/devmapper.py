# SPDX-License-Identifier: Apache-2.0
"""Tables of device-mapper devices (include/uapi/linux/dm-ioctl.h): what their contents are made of."""

from __future__ import annotations

import os
import struct

from stasis.linux import ioctl

__all__ = ["Target", "is_mapped", "table"]

CONTROL = "/dev/mapper/control"

# struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev,
# name[128], uuid[129], data[7]
HEADER = struct.Struct("=3I2I I i 3I Q128s129s7x")
# struct dm_target_spec: sector_start, length, status, next, target_type[16]
SPEC = struct.Struct("=QQiI16s")
VERSION = (4, 0, 0)
DM_TABLE_STATUS = ioctl.IOWR(0xFD, 12, HEADER.size)

DM_STATUS_TABLE_FLAG = 1 << 4
DM_BUFFER_FULL_FLAG = 1 << 8
DM_NOFLUSH_FLAG = 1 << 11
DM_SECURE_DATA_FLAG = 1 << 15  # the table of an encrypted device may have its key
FLAGS = DM_STATUS_TABLE_FLAG | DM_NOFLUSH_FLAG | DM_SECURE_DATA_FLAG

TARGET_COUNT, FLAGS_FIELD = 5, 7
SMALLEST, LARGEST = 16 << 10, 16 << 20

Target = tuple[int, int, str, str]
"""First sector, sectors, kind, and what the kind's driver is told."""


def is_mapped(major: int, minor: int) -> bool:
    """Whether a device belongs to device-mapper."""
    return os.path.exists(f"/sys/dev/block/{major}:{minor}/dm")


def table(major: int, minor: int) -> list[Target]:
    """The targets of a device, in order. Writes nothing and waits for nobody. Raises OSError."""
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = SMALLEST
        while size <= LARGEST:
            answer = _ask(fd, os.makedev(major, minor), size)
            fields = HEADER.unpack_from(answer)
            if not fields[FLAGS_FIELD] & DM_BUFFER_FULL_FLAG:
                return _targets(answer, fields[TARGET_COUNT])
            size *= 4
    finally:
        os.close(fd)
    return []


def _ask(fd: int, device: int, size: int) -> bytearray:
    buffer = bytearray(size)
    HEADER.pack_into(buffer, 0, *VERSION, size, HEADER.size, 0, 0, FLAGS, 0, 0, device, b"", b"")
    ioctl.call(fd, "DM_TABLE_STATUS", DM_TABLE_STATUS, buffer)
    return buffer


def _targets(answer: bytearray, count: int) -> list[Target]:
    found, at = [], HEADER.size
    for _ in range(count):
        start, length, _, following, kind = SPEC.unpack_from(answer, at)
        parameters = answer[at + SPEC.size :].split(b"\0", 1)[0]
        found.append((start, length, _text(kind), _text(parameters)))
        at = HEADER.size + following
    return found


def _text(field: bytes | bytearray) -> str:
    return bytes(field).split(b"\0", 1)[0].decode(errors="surrogateescape")
