# SPDX-License-Identifier: Apache-2.0
"""An export in memory whose every call can be seen and made to fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from stasis.linux.iobuffer import IoBuffer
from stasis.nbd import protocol as p
from stasis.nbd.export import Export, Request

__all__ = ["MemoryExport"]

BLOCK = 4096
DIRTY = p.QEMU_DIRTY_BITMAP + "epoch-1"


class MemoryExport(Export):
    """Bytes in memory. `faults[offset]` is the errno that any request covering that byte gets."""

    can_multi_conn = can_trim = can_zero = can_fast_zero = can_cache = reports_holes = True

    def __init__(self, size: int = 1 << 20, name: str = "disk", description: str = "a test disk") -> None:
        self.name, self.description, self.size = name, description, size
        self.data = bytearray(size)
        self.holes = bytearray(b"\x01" * -(-size // BLOCK))
        self.dirty = bytearray(len(self.holes))
        self.faults: dict[int, int] = {}
        self.calls: list[tuple[str, int]] = []
        """(method, number of requests) of every call."""

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        self.calls.append(("read", len(requests)))
        for offset, length, position in requests:
            self._check(offset, length)
            assert position % self.alignment == 0
            buffer.view[position : position + length] = self.data[offset : offset + length]

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        self.calls.append(("write", len(requests)))
        assert not self.read_only
        for offset, length, position in requests:
            self._check(offset, length)
            self.data[offset : offset + length] = buffer.view[position : position + length]
            self._mark(offset, length, hole=0)

    def flush(self) -> None:
        self.calls.append(("flush", 1))
        self._check(0, 0)

    def trim(self, offset: int, length: int) -> Iterator[None]:
        self.calls.append(("trim", 1))
        yield from self._erase(offset, length, punch=True)

    def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> Iterator[None]:
        self.calls.append(("punch" if punch else "zero", 1))
        if fast and not punch:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return self._erase(offset, length, punch=punch)

    def cache(self, offset: int, length: int) -> None:
        self.calls.append(("cache", 1))
        self._check(offset, length)

    def contexts(self) -> Sequence[str]:
        return (p.BASE_ALLOCATION, DIRTY, p.QEMU_ALLOCATION_DEPTH)

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        self._check(offset, length)
        extents: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            part = min(end, (offset // BLOCK + 1) * BLOCK) - offset
            flags = self._status(context, offset // BLOCK)
            if extents and extents[-1][1] == flags:
                part += extents.pop()[0]
            extents.append((part, flags))
            offset = (offset // BLOCK + 1) * BLOCK
        return extents

    def _status(self, context: str, block: int) -> int:
        if context == p.BASE_ALLOCATION:
            return (p.NBD_STATE_HOLE | p.NBD_STATE_ZERO) * self.holes[block]
        if context == DIRTY:
            return self.dirty[block]
        return 1 - self.holes[block]

    def _erase(self, offset: int, length: int, *, punch: bool) -> Iterator[None]:
        """In steps of 64 KiB."""
        for start in range(offset, offset + length, 64 << 10):
            part = min(64 << 10, offset + length - start)
            self._check(start, part)
            self.data[start : start + part] = bytes(part)
            if punch:
                self._punch(start, part)
            else:
                self._mark(start, part, hole=0)
            yield

    def _punch(self, offset: int, length: int) -> None:
        self._mark(offset, length, hole=None)
        for block in range(-(-offset // BLOCK), (offset + length) // BLOCK):
            self.holes[block] = 1

    def _mark(self, offset: int, length: int, *, hole: int | None) -> None:
        for block in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            self.dirty[block] = 1
            if hole is not None:
                self.holes[block] = hole

    def _check(self, offset: int, length: int) -> None:
        for fault, number in self.faults.items():
            if offset <= fault < offset + length or (fault < 0 and not length):
                raise OSError(number, os.strerror(number))
