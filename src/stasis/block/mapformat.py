# SPDX-License-Identifier: Apache-2.0
"""Layout of a change map's file, and the plain values that are read from it (docs/formats/change-map.md)."""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stasis.linux import process

MAGIC = b"STASISCM"
VERSION = 1
HEADER_SIZE = 4096
HIGHEST_NUMBER = 255

# magic, version, block shift, capacity, block count, generation, held generation, active number,
# previous number, held number, flags, boot id, identity of the origin (device, inode, size, time or
# write counter), text of what was assumed at the last unclean start, CRC-32 of all before it.
HEADER = struct.Struct("<8sIIQQ16s16sBBBB16sQQQq200sI")
ALIVE = struct.Struct("<Q")
ALIVE_OFFSET = 1024
FS_MARK_OFFSET, FS_MARK_SIZE = 1032, 32
NO_FS_MARK = bytes(FS_MARK_SIZE)

FLAG_CLEAN = 1
FLAG_HELD = 2
FLAG_BROKEN = 4


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells that nobody else wrote to the origin while it was not served."""

    device: int = 0
    inode: int = 0
    size: int = 0
    mark: int = -1
    """Modification time (ns) of an image file, sectors written of a block device, -1 if unknown."""


@dataclass(frozen=True, slots=True)
class MapInfo:
    """A change map's figures; sizes in bytes."""

    block_size: int
    block_count: int
    capacity: int
    generation: str
    change_number: int
    held_generation: str | None
    held_change_number: int | None
    clean: bool
    broken: bool
    assumed: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """The epoch that a snapshot ended."""

    generation: str
    change_number: int
    wrapped: bool


ONLY_ONE = bytes(1 if value == 1 else 0 for value in range(256))
"""Translation that keeps blocks with number 1 and clears the others."""


def above(since: int) -> bytes:
    """Translation that gives 1 for numbers greater than `since` and 0 for the others."""
    return bytes(1 if value > since else 0 for value in range(256))


def this_boot() -> bytes:
    """The boot id as 16 bytes."""
    return uuid.UUID(process.boot_id()).bytes


def padded(count: int) -> int:
    """Bytes that a map of `count` blocks takes in the file."""
    return -(-count // 4096) * 4096


def sealed(fields: tuple[Any, ...]) -> bytes:
    """A header with its CRC."""
    body = HEADER.pack(*fields, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
