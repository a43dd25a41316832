# SPDX-License-Identifier: Apache-2.0
"""A COW file in the hands of the tracer that writes it: old contents are appended, the index points at them.

Nothing is published before it is in the file (docs/design/copy-on-write.md has the order and why), and everything
goes to the kernel's page cache at once: a process that dies leaves a file that lacks no more than the fields of its
header, which `reopen` counts anew. What a power cut takes is another matter; see docs/design/datto.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from errno import EFBIG, EIO

from stasis.block.origin import Request
from stasis.datto.extents import NOTHING
from stasis.datto.index import Index
from stasis.datto.layout import (
    BLOCK_SHIFT,
    FLAG_CLEAN,
    FLAG_INDEX_ONLY,
    VERSION_CHANGED_BLOCKS,
    Geometry,
    Header,
)
from stasis.datto.scan import Run
from stasis.datto.waiting import Waiting
from stasis.linux import files

__all__ = ["CowFile"]

STRETCH = 64 << 10
"""Bytes in one write of data; longer ones have the file system take longer folios, which costs more (see block/cow)."""


class CowFile:
    """An open COW file, one writer. `header` is as it will be written; the file's own may be older."""

    territory = NOTHING
    """What of the device belongs to the file itself."""
    can_grow = True

    def __init__(self, path: str, fd: int, geometry: Geometry, header: Header, cache: int, *, fresh: bool) -> None:
        self.path, self.fd, self.geometry, self.header = path, fd, geometry, header
        self.index = Index(fd, geometry, cache, fresh=fresh)
        self._waiting = Waiting(geometry.blocks)
        info = os.fstat(fd)
        self._inode = info.st_dev, info.st_ino

    def close(self) -> None:
        """Close the file as it is."""
        os.close(self.fd)

    # -- what it holds --------------------------------------------------------------------------------

    @property
    def is_index_only(self) -> bool:
        return self.header.is_index_only

    @property
    def free_slots(self) -> int:
        """Blocks for which there is room."""
        return max(0, (self.header.fsize >> BLOCK_SHIFT) - self.header.fpos)

    @property
    def filled_percent(self) -> int:
        """How much of the room for data is taken."""
        taken = self.header.fpos - self.geometry.first_slot
        return 100 * taken // max(1, taken + self.free_slots)

    def read_bytes(self, offset: int, place: memoryview) -> None:
        """Fill `place` from byte `offset` of the file. OSError EIO if it ends early."""
        done = os.preadv(self.fd, [place], offset)
        if done < len(place):
            files.transfer_rest(os.preadv, self.fd, [place], offset, done)

    def check(self) -> None:
        """Raise the OSError of a write to the disk that failed after the fact."""
        files.writeback_error(self.fd)

    # -- entering changes -----------------------------------------------------------------------------

    def keep(self, runs: Sequence[Run], data: memoryview) -> None:
        """Store the old contents of blocks without an entry, one run behind the other in `data`, and publish them.

        OSError EFBIG if there is no room for all of them; nothing is published then.
        """
        count = len(data) >> BLOCK_SHIFT
        if count > self.free_slots:
            raise OSError(EFBIG, "the COW file is full", self.path)
        slot = self.header.fpos
        for start in range(0, len(data), STRETCH):
            self._write(data[start : start + STRETCH], (slot << BLOCK_SHIFT) + start)
        self.header.fpos += count
        self._count(count)
        for first, end in runs:
            self.index.point(first, end - first, slot)
            slot += end - first

    def _write(self, data: memoryview, offset: int) -> None:
        done = os.pwritev(self.fd, [data], offset)
        if done < len(data):
            files.transfer_rest(os.pwritev, self.fd, [data], offset, done)

    def mark(self, first: int, end: int) -> None:
        """Enter blocks first to end as changed."""
        self._count(self.index.mark(first, end))

    def mark_soon(self, requests: Sequence[Request]) -> bool:
        """Enter what these requests change with the next `catch_up`; True if it is time for that.

        Until then the log must have their regions.
        """
        return self._waiting.add(requests)

    def catch_up(self) -> None:
        """Enter what waits for it. OSError."""
        for number, plane in self._waiting.take():
            self._count(self.index.mark_plane(number, plane))

    def _count(self, changed: int) -> None:
        if self.header.version >= VERSION_CHANGED_BLOCKS:
            self.header.changed_blocks += changed

    # -- life -------------------------------------------------------------------------------------------

    def write_header(self, *, clean: bool = False) -> None:
        """Write the header, with or without its clean flag. Not durable by itself."""
        self.header.flags = self.header.flags & ~FLAG_CLEAN | (FLAG_CLEAN if clean else 0)
        if os.pwrite(self.fd, self.header.pack(), 0) != len(self.header.pack()):
            raise OSError(EIO, "the header of the COW file was written in part", self.path)

    def sync(self) -> None:
        """Make everything written durable."""
        os.fdatasync(self.fd)

    def finish(self) -> None:
        """Make the file complete and durable, and only then clean. The last thing before `close`."""
        self.catch_up()
        self.sync()
        self.write_header(clean=True)
        self.sync()

    def become_index_only(self) -> None:
        """From now on it says which blocks changed and keeps no contents. The data are cut off if that works."""
        self.header.flags |= FLAG_INDEX_ONLY
        self.write_header()
        with contextlib.suppress(OSError):  # it stays large then, as dattobd's does
            os.ftruncate(self.fd, self.geometry.data_offset)
            self.header.fsize = self.geometry.data_offset
            self.write_header()

    def expand(self, length: int) -> None:
        """Add `length` bytes of room. OSError of fallocate; the file is then as it was."""
        files.allocate(self.fd, self.header.fsize, length)
        self.header.fsize += length
        self.write_header()

    def may_expand(self, length: int, reserved: int) -> bool:
        """Whether the file system has `length` bytes free and `reserved` besides."""
        space = os.fstatvfs(self.fd)
        return -(-(length + reserved) // space.f_bsize) <= space.f_bavail * space.f_frsize // space.f_bsize

    def release(self) -> None:
        """The file is finished and anybody's. Beside the loop, before `close`. OSError."""

    def unlink(self) -> None:
        """Remove the file by its name, if that still is this very file."""
        with contextlib.suppress(OSError):
            info = os.stat(self.path, follow_symlinks=False)
            if (info.st_dev, info.st_ino) == self._inode:
                os.unlink(self.path)
