# SPDX-License-Identifier: Apache-2.0
"""dattobd's COW file as data: the header, where index and data lie, how large a file is by default.

docs/formats/datto-cow.md has the tables byte by byte. The integers are in the byte order of the host, as dattobd
writes them.
"""

from __future__ import annotations

import struct
from errno import EINVAL, EIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stasis.errors import StasisError

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


class Header:
    """The header's fields: `fpos` in blocks from the file's start, `fsize` in bytes, `uuid` raw."""

    __slots__ = ("changed_blocks", "flags", "fpos", "fsize", "seqid", "uuid", "version")

    def __init__(self, flags: int, fpos: int, fsize: int, seqid: int, uuid: bytes,
                 version: int = VERSION_CHANGED_BLOCKS, changed_blocks: int = 0) -> None:
        self.flags, self.fpos, self.fsize, self.seqid, self.uuid = flags, fpos, fsize, seqid, uuid
        self.version, self.changed_blocks = version, changed_blocks

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
            raise _damaged(path)
        magic, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise _foreign(path)
        return cls(*fields)


def _damaged(path: str) -> StasisError:
    from stasis.errors import DamagedError  # here, so that `update-img` starts without

    return DamagedError(f"{path} is too short for a COW file", errno=EIO, hint="it was cut off")


def _foreign(path: str) -> StasisError:
    from stasis.errors import StateError

    return StateError(f"{path} is no COW file of dattobd", errno=EINVAL, hint="its first bytes say so")


class Geometry:
    """Where things lie in the COW file of a device of `size` bytes. A short last block counts as a block."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and self.size == other.size

    def __hash__(self) -> int:
        return hash(self.size)

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
