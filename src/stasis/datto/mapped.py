# SPDX-License-Identifier: Apache-2.0
"""A COW file whose blocks are written on the device itself, under the file system that the file belongs to.

What is written this way is no change to the tracer. The device's change map and a snapshot of the device know of it as
of any write, but for what is written beside the loop. The file system's own view of the file is brought up to date when
the file is given back (placing.release).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from errno import EIO
from typing import Protocol

from stasis.block.origin import Request
from stasis.datto.claim import Claim
from stasis.datto.cowfile import CowFile
from stasis.datto.extents import BlockMap, Territory
from stasis.datto.index import Index
from stasis.datto.layout import (
    BLOCK_SIZE,
    FLAG_CLEAN,
    FLAG_INDEX_ONLY,
    HEADER_AREA,
    SECTION_BLOCKS,
    SECTION_SHIFT,
    Geometry,
    Header,
)
from stasis.datto.pinned import Pinned
from stasis.datto.waiting import Waiting
from stasis.linux import files

__all__ = ["DeviceBlocks", "MappedCowFile", "Owner"]

COPY_STEP = 1 << 20


class Owner(Protocol):
    """Who does the file system's side, beside the loop."""

    def shrink(self, pinned: Pinned, to: Pinned) -> None:
        """The file is to be cut off; what is cut off is written no more."""
        ...

    def release(self, pinned: Pinned, head: bytes) -> None:
        """Give the file back to the file system, as it is. Called beside the loop. OSError."""
        ...

    def remove(self, pinned: Pinned) -> None:
        """The file is to go."""
        ...


class DeviceBlocks:
    """The bytes of a file by their places on the device, through a descriptor of the origin that becomes ours."""

    def __init__(self, fd: int, blocks: BlockMap, before: Callable[[Sequence[Request]], None]) -> None:
        """`before` is told of what is going to be written in the loop."""
        self.fd, self.blocks, self._before = fd, blocks, before
        self.is_sealed = False
        """Set for good once nothing more may be written."""
        self.claim: Claim | None = None
        """Set while they are written beside the loop."""

    def read(self, place: memoryview, offset: int) -> None:
        """Fill `place` from byte `offset` of the file. OSError."""
        for physical, position, length in self.blocks.pieces(offset, len(place)):
            target = place[position : position + length]
            done = os.preadv(self.fd, [target], physical)
            if done < length:
                files.transfer_rest(os.preadv, self.fd, [target], physical, done)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` to byte `offset` of the file. OSError; EIO once it is sealed."""
        if self.is_sealed:
            raise OSError(EIO, "the COW file is not ours any more")
        if self.claim is not None:
            with self.claim.held():
                self._write(data, offset)
            return
        place = self.blocks.place(offset, len(data))
        if place < 0:
            self.announce(offset, len(data))
            self._write(data, offset)
            return
        self._before([(place, len(data), 0)])
        if os.pwrite(self.fd, data, place) != len(data):
            self._write(data, offset)

    def announce(self, offset: int, length: int) -> None:
        """Bytes of the file are going to be written. In the loop."""
        self._before([(physical, count, 0) for physical, _, count in self.blocks.pieces(offset, length)])

    def _write(self, data: memoryview, offset: int) -> None:
        for physical, position, length in self.blocks.pieces(offset, len(data)):
            source = data[position : position + length]
            done = os.pwritev(self.fd, [source], physical)
            if done < length:
                files.transfer_rest(os.pwritev, self.fd, [source], physical, done)

    def copy(self, length: int, size: int) -> int:
        """A memory file of `size` bytes that begins with the first `length` of the file. OSError."""
        fd = os.memfd_create("cow-index", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            buffer = memoryview(bytearray(COPY_STEP))
            for offset in range(0, length, COPY_STEP):
                part = buffer[: min(COPY_STEP, length - offset)]
                self.read(part, offset)
                if any(part):
                    os.pwrite(fd, part, offset)
        except BaseException:
            os.close(fd)
            raise
        return fd


class MappedIndex(Index):
    """The index of such a file."""

    def __init__(self, blocks: DeviceBlocks, geometry: Geometry, cache: int, *, fresh: bool) -> None:
        super().__init__(-1, geometry, cache, fresh=fresh)
        self._blocks = blocks

    def _read(self, place: memoryview, offset: int) -> None:
        self._blocks.read(place, offset)

    def _write(self, data: memoryview, offset: int) -> None:
        self._blocks.write(data, offset)

    def enter(self, block: int, value: int) -> int:
        number, low = block >> SECTION_SHIFT, block & (SECTION_BLOCKS - 1)
        section = self.section(number)
        before: int = section[low]
        section[low] = value
        self._has_entries[number] = 1
        self._blocks.write(memoryview(value.to_bytes(8, sys.byteorder)), HEADER_AREA + block * 8)
        return before


class MappedCowFile(CowFile):
    """A COW file on the device. `pinned` says where, `owner` does what only the file system can do."""

    can_grow = False

    def __init__(self, pinned: Pinned, blocks: DeviceBlocks, geometry: Geometry, header: Header, cache: int,
                 owner: Owner, *, fresh: bool) -> None:
        self.path, self.fd, self.geometry, self.header = pinned.path, blocks.fd, geometry, header
        self.pinned, self._blocks, self._owner = pinned, blocks, owner
        self.index = MappedIndex(blocks, geometry, cache, fresh=fresh)
        self.territory = Territory(blocks.blocks.ranges(), BLOCK_SIZE)
        self._waiting = Waiting(geometry.blocks)

    @property
    def claim(self) -> Claim | None:
        """What `watch` was told last."""
        return self._blocks.claim

    def watch(self, claim: Claim | None) -> None:
        """From here on it is written beside the loop, under a claim; None: in the loop again, or no more."""
        self._blocks.announce(0, BLOCK_SIZE)  # the header: all that is left different beside the loop
        self._blocks.claim = claim

    def close(self) -> None:
        self._blocks.is_sealed = True
        os.close(self.fd)

    def read_bytes(self, offset: int, place: memoryview) -> None:
        self._blocks.read(place, offset)

    def _write(self, data: memoryview, offset: int) -> None:
        self._blocks.write(data, offset)

    def write_header(self, *, clean: bool = False) -> None:
        self.header.flags = self.header.flags & ~FLAG_CLEAN | (FLAG_CLEAN if clean else 0)
        self._blocks.write(memoryview(self.header.pack()), 0)

    def become_index_only(self) -> None:
        self.header.flags |= FLAG_INDEX_ONLY
        self.header.fsize = self.geometry.data_offset
        self.write_header()
        before, self.pinned = self.pinned, self.pinned.cut(self.geometry.data_offset)
        self._blocks.blocks = self.pinned.blocks
        self.territory = Territory(self.pinned.blocks.ranges(), BLOCK_SIZE)
        self._owner.shrink(before, self.pinned)

    def expand(self, length: int) -> None:
        raise OSError(EIO, "a COW file on its own device cannot grow", self.path)

    def may_expand(self, length: int, reserved: int) -> bool:
        return False

    def release(self) -> None:
        self._blocks.is_sealed = True
        self._owner.release(self.pinned, self.header.pack())

    def unlink(self) -> None:
        self._blocks.is_sealed = True
        self._owner.remove(self.pinned)


