# SPDX-License-Identifier: Apache-2.0
"""Which regions may hold marks that have not reached the disk: the write-intent log.

Before the first new mark in a region its byte in the log is made durable; after the change map has been
made durable the byte is cleared again. After a power cut every block of a region whose byte is set counts
as changed. Layout: docs/formats/write-intent-log.md; why this suffices: docs/design/change-maps.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from stasis.errors import StateError

MAGIC = b"STASISWI"
VERSION = 1
HEADER = struct.Struct("<8sIIQ16s")
HEADER_SIZE = 512
SECTOR = 512


class IntentLog:
    """The log of one device. `regions[i]` is 1 while region i may have marks that are not durable."""

    def __init__(self, path: Path, fd: int, shift: int, regions: bytearray, generation: bytes) -> None:
        self.path, self.fd, self.shift, self.regions = path, fd, shift, regions
        self.generation = generation
        """16 bytes that name what the log belongs to, as its maker chose them."""
        self._touched: set[int] = set()

    @classmethod
    def create(cls, path: Path, size: int, shift: int, generation: bytes = bytes(16)) -> IntentLog:
        """A log with every region set in place of whatever `path` held, durably.

        Until its map is in place it may meet the one before, of which it knows nothing.
        """
        count = max(1, -(-size >> shift))
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        header = HEADER.pack(MAGIC, VERSION, shift, count, generation).ljust(HEADER_SIZE, b"\0")
        try:
            os.pwrite(fd, header + (b"\1" * count).ljust(-(-count // SECTOR) * SECTOR, b"\0"), 0)
            os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, shift, bytearray(b"\1" * count), generation)

    @classmethod
    def open(cls, path: Path) -> IntentLog:
        """Open an existing log. FileNotFoundError, or StateError if it is damaged."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = os.pread(fd, HEADER_SIZE, 0)
            if len(header) < HEADER_SIZE or header[:8] != MAGIC:
                raise StateError(f"{path} is no write-intent log", hint="remove it; tracking starts a new generation")
            _, version, shift, count, generation = HEADER.unpack_from(header)
            regions = bytearray(os.pread(fd, count, HEADER_SIZE))
            if version != VERSION or len(regions) != count or regions.strip(b"\0\1"):
                raise StateError(f"{path} is damaged", hint="remove it; tracking starts a new generation")
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, shift, regions, generation)

    def add(self, regions: set[int]) -> None:
        """Set regions, durably: on return they survive a power cut. Regions already set cost nothing."""
        new = {region for region in regions if not self.regions[region]}
        self._touched.update(regions)
        if not new:
            return
        for region in new:
            self.regions[region] = 1
        self._write(new)
        os.fdatasync(self.fd)

    def add_requests(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """`add` the regions of (offset, length, …) in bytes, mostly set already; those behind the last are left out."""
        # Hot: one call for a batch of writes. Where they go everywhere, no region is looked at any more.
        touched, shift = self._touched, self.shift
        if len(touched) == len(self.regions):
            return
        regions = [request[0] >> shift for request in requests]
        if regions != [(request[0] + request[1] - 1) >> shift for request in requests]:
            regions = [region for offset, length, _ in requests
                       for region in range(offset >> shift, ((offset + length - 1) >> shift) + 1)]
        if not touched.issuperset(regions):
            self.add({region for region in regions if region < len(self.regions)})

    def rename_generation(self, generation: bytes) -> None:
        """Enter another generation, durably."""
        self.generation = generation
        os.pwrite(self.fd, HEADER.pack(MAGIC, VERSION, self.shift, len(self.regions), generation), 0)
        os.fdatasync(self.fd)

    def dirty(self) -> list[int]:
        """Regions that are set."""
        return [index for index, value in enumerate(self.regions) if value]

    def start_clearing(self) -> list[int]:
        """Regions that may be cleared once the change map, as it is now, is durable."""
        self._touched.clear()
        return self.dirty()

    def clear(self, regions: Iterable[int]) -> None:
        """Clear what `start_clearing` gave, except regions that got new marks meanwhile.

        Not made durable: a cleared byte that comes back after a power cut only makes more blocks changed.
        """
        gone = set(regions) - self._touched
        for region in gone:
            self.regions[region] = 0
        self._write(gone)

    def _write(self, regions: set[int]) -> None:
        for sector in {region // SECTOR for region in regions}:
            start = sector * SECTOR
            os.pwrite(self.fd, bytes(self.regions[start : start + SECTOR]), HEADER_SIZE + start)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)
