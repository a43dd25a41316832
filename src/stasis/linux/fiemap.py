# SPDX-License-Identifier: Apache-2.0
"""Where the contents of a file lie on its device (FS_IOC_FIEMAP, Documentation/filesystems/fiemap.rst)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from stasis.linux import ioctl

__all__ = [
    "FIEMAP_EXTENT_DATA_ENCRYPTED",
    "FIEMAP_EXTENT_DATA_INLINE",
    "FIEMAP_EXTENT_DATA_TAIL",
    "FIEMAP_EXTENT_DELALLOC",
    "FIEMAP_EXTENT_ENCODED",
    "FIEMAP_EXTENT_LAST",
    "FIEMAP_EXTENT_NOT_ALIGNED",
    "FIEMAP_EXTENT_SHARED",
    "FIEMAP_EXTENT_UNKNOWN",
    "FIEMAP_EXTENT_UNWRITTEN",
    "FIEMAP_FLAG_SYNC",
    "FileExtent",
    "extents",
]

# include/uapi/linux/fiemap.h
FIEMAP_FLAG_SYNC = 0x1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2
FIEMAP_EXTENT_DELALLOC = 0x4
FIEMAP_EXTENT_ENCODED = 0x8
FIEMAP_EXTENT_DATA_ENCRYPTED = 0x80
FIEMAP_EXTENT_NOT_ALIGNED = 0x100
FIEMAP_EXTENT_DATA_INLINE = 0x200
FIEMAP_EXTENT_DATA_TAIL = 0x400
FIEMAP_EXTENT_UNWRITTEN = 0x800
FIEMAP_EXTENT_SHARED = 0x2000

WHOLE_FILE = (1 << 64) - 1
PER_CALL = 500


class _Header(ctypes.Structure):
    """struct fiemap, without its array of extents."""

    _fields_ = [
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("mapped_extents", ctypes.c_uint32),
        ("extent_count", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class _Extent(ctypes.Structure):
    """struct fiemap_extent."""

    _fields_ = [
        ("logical", ctypes.c_uint64),
        ("physical", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("reserved64", ctypes.c_uint64 * 2),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 3),
    ]


FS_IOC_FIEMAP = ioctl.IOWR("f", 11, _Header)


@dataclass(frozen=True, slots=True)
class FileExtent:
    """A stretch of a file: `logical` is its place in the file, `physical` that on the device, all in bytes."""

    logical: int
    physical: int
    length: int
    flags: int


def extents(
    fd: int, offset: int = 0, length: int = WHOLE_FILE, *, flags: int = 0, per_call: int = PER_CALL
) -> Iterator[FileExtent]:
    """The extents of a file that touch the range, ascending; holes are left out.

    Raises OSError naming FS_IOC_FIEMAP: EOPNOTSUPP where the file system cannot tell.
    """
    end = min(offset + length, WHOLE_FILE)
    while offset < end:
        found = _ask(fd, offset, end - offset, flags, per_call)
        yield from found
        if len(found) < per_call or found[-1].flags & FIEMAP_EXTENT_LAST:
            return
        offset = found[-1].logical + found[-1].length


def _ask(fd: int, offset: int, length: int, flags: int, count: int) -> list[FileExtent]:
    size = ctypes.sizeof(_Header)
    buffer = bytearray(size + count * ctypes.sizeof(_Extent))
    header = _Header.from_buffer(buffer)
    header.start, header.length, header.flags, header.extent_count = offset, length, flags, count
    ioctl.call(fd, "FS_IOC_FIEMAP", FS_IOC_FIEMAP, buffer)
    found = (_Extent * header.mapped_extents).from_buffer(buffer, size)
    return [FileExtent(one.logical, one.physical, one.length, one.flags) for one in found]
