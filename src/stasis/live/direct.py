# SPDX-License-Identifier: Apache-2.0
"""Reading a live device past the page cache, many places at a time.

A block device's own page cache does not see what a file system above it writes, so what it holds may be old. Direct
reads (O_DIRECT) always come from the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stasis.linux import blockdev, uring
from stasis.linux.iobuffer import IoBuffer
from stasis.linux.memory import view_at

if TYPE_CHECKING:
    from stasis.backup.source import Extent

__all__ = ["DirectReader", "Place"]

Place = tuple[int, int, int]
"""Offset on the device, memory address, length in bytes."""

LONGEST = 1 << 20
DEPTH = 32
MEMORY_ALIGNMENT = 512  # include/linux/blkdev.h, queue_dma_alignment: 511 for all that ask for more than 3


class DirectReader:
    """One open device. A thread has one of its own."""

    def __init__(self, path: str) -> None:
        """Open it. Raises OSError."""
        self._path = path
        self._closing = contextlib.ExitStack()
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._closing.callback(os.close, self.fd)
        try:
            self._sector = blockdev.logical_block_size(self.fd)
            self._sequence = blockdev.disk_sequence(self.fd)
            self._ring = self._closing.enter_context(uring.Ring(DEPTH)) if uring.Ring.available() else None
        except BaseException:
            self._closing.close()
            raise

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Read extents into the buffer, one right behind the other. Raises OSError."""
        address, places = ctypes.addressof(ctypes.c_char.from_buffer(buffer)), []
        for offset, length in extents:
            places.append((offset, address, length))
            address += length
        self.read_places(places)

    def read_places(self, places: Iterable[Place]) -> None:
        """Read each place into the memory it names. Raises OSError; ConnectionAbortedError when the device is gone."""
        straight: list[Place] = []
        crooked: list[Place] = []
        odd = max(self._sector, MEMORY_ALIGNMENT) - 1  # both are powers of two
        for place in _cut(places):
            offset, address, length = place
            (crooked if (offset | address | length) & odd else straight).append(place)
        try:
            self._read_straight(straight)
            for place in crooked:
                self._read_crooked(place)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENODEV) or self._is_gone():
                raise ConnectionAbortedError(errno.ENODEV, os.strerror(errno.ENODEV), self._path) from error
            raise

    def _is_gone(self) -> bool:
        """Whether the device vanished, or is another one by now."""
        try:
            return not blockdev.size(self.fd) or blockdev.disk_sequence(self.fd) != self._sequence
        except OSError:
            return True

    def _read_straight(self, places: Sequence[Place]) -> None:
        if self._ring is None:
            for place in places:
                self._read_one(place)
            return
        fd, read = self.fd, uring.OP_READ
        operations = [(read, fd, offset, address, length) for offset, address, length in places]
        for place, done in zip(places, self._ring.run(operations), strict=True):
            if done < 0:
                raise OSError(-done, os.strerror(-done), self._path)
            if done < place[2]:  # cut short by a signal or the end of what can be read: find out which
                self._read_one((place[0] + done, place[1] + done, place[2] - done))

    def _read_one(self, place: Place) -> None:
        offset, address, length = place
        while length:
            done = os.preadv(self.fd, [view_at(address, length)], offset)
            if not done:
                raise OSError(errno.EIO, "the device is shorter than it was", self._path)
            offset, address, length = offset + done, address + done, length - done

    def _read_crooked(self, place: Place) -> None:
        """A place that direct reads do not allow: by way of an aligned buffer around it."""
        offset, address, length = place
        first = offset - offset % self._sector
        whole = -(-(offset + length) // self._sector) * self._sector - first
        with IoBuffer(whole) as room:
            self._read_one((first, room.address, whole))
            view_at(address, length)[:] = room.view[offset - first : offset - first + length]

    def abort(self) -> None:
        """Nothing to do: a read of a disk ends by itself."""

    def close(self) -> None:
        """Close the device and the ring."""
        self._closing.close()


def _cut(places: Iterable[Place]) -> Iterator[Place]:
    """The places in pieces that travel side by side."""
    for offset, address, length in places:
        for start in range(0, length, LONGEST):
            yield offset + start, address + start, min(LONGEST, length - start)
