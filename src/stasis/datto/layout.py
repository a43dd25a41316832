# SPDX-License-Identifier: Apache-2.0
"""dattobd's COW file as data: the header, where index and data lie, how large a file is by default.

docs/formats/datto-cow.md has the tables byte by byte. The integers are in the byte order of the host, as dattobd
writes them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from errno import EINVAL, EIO

from stasis.errors import DamagedError, StateError

__all__ = [
    "BLOCK_SHIFT",
    "BLOCK_SIZE",
    "CACHE_DEFAULT",
    "CHANGED",
    "FLAG_CLEAN",
    "FLAG_INDEX_ONLY",
    "HEADER_AREA",
    "SECTION_BLOCKS",
    "SECTION_SIZE",
    "VERSION_CHANGED_BLOCKS",
    "Geometry",
    "Header",
    "default_size",
]

MAGIC = 4776
BLOCK_SHIFT = 12
BLOCK_SIZE = 1 << BLOCK_SHIFT
HEADER_AREA = 4096
SECTION_SHIFT = 12
SECTION_BLOCKS = 1 << SECTION_SHIFT
SECTION_SIZE = SECTION_BLOCKS * 8

FLAG_CLEAN = 1
FLAG_INDEX_ONLY = 2
FLAG_VMALLOC_UPPER = 4
"""How the kernel module had its index in memory; without meaning on the disk."""

CHANGED = 1
"""Index entry of a block that changed and whose old contents were not kept."""

VERSION_CHANGED_BLOCKS = 1
"""First version of the format that counts changed blocks."""

CACHE_DEFAULT = 300 << 20
PERCENT_DEFAULT = 10

_HEADER = struct.Struct("=IIQQQ16sQQ")


@dataclass(slots=True)
class Header:
    """The header's fields: `fpos` in blocks from the file's start, `fsize` in bytes, `uuid` raw."""

    flags: int
    fpos: int
    fsize: int
    seqid: int
    uuid: bytes
    version: int = VERSION_CHANGED_BLOCKS
    changed_blocks: int = 0

    @property
    def is_clean(self) -> bool:
        return bool(self.flags & FLAG_CLEAN)

    @property
    def is_index_only(self) -> bool:
        return bool(self.flags & FLAG_INDEX_ONLY)

    def pack(self) -> bytes:
        """The 64 bytes at the start of the file."""
        return _HEADER.pack(MAGIC, self.flags, self.fpos, self.fsize, self.seqid, self.uuid, self.version,
                            self.changed_blocks)

    @classmethod
    def unpack(cls, data: bytes, path: str) -> Header:
        """DamagedError (EIO) if `data` is too short, StateError (EINVAL) if it is no header of a COW file."""
        if len(data) < _HEADER.size:
            raise DamagedError(f"{path} is too short for a COW file", errno=EIO, hint="it was cut off")
        magic, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise StateError(f"{path} is no COW file of dattobd", errno=EINVAL, hint="its first bytes say so")
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things lie in the COW file of a device of `size` bytes. A short last block counts as a block."""

    size: int

    @property
    def blocks(self) -> int:
        return -(-self.size >> BLOCK_SHIFT)

    @property
    def sections(self) -> int:
        return -(-self.blocks >> SECTION_SHIFT)

    @property
    def data_offset(self) -> int:
        """Byte at which the data begin, behind header and index."""
        return HEADER_AREA + self.sections * SECTION_SIZE

    @property
    def first_slot(self) -> int:
        """Block of the file that holds the first data."""
        return self.data_offset >> BLOCK_SHIFT


def default_size(device_size: int) -> int:
    """Bytes of a COW file that nobody gave a size: a tenth of the device's whole sectors, not rounded."""
    return device_size // 512 * 512 * PERCENT_DEFAULT // 100
