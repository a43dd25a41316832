# SPDX-License-Identifier: Apache-2.0
"""The image of a device as it was at the snapshot: read without a lock, written through the device's worker.

A read looks every part up in the chunk table. What is not stored is read from the origin, and then looked up
again: what is stored by now was overwritten meanwhile, so that read is thrown away and the stored contents are
taken. docs/design/copy-on-write.md proves that this is right whatever the worker does at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from errno import EIO
from operator import methodcaller

from stasis.block.changemap import ChangeMap
from stasis.block.chunktable import ZERO, ChunkTable, part_range
from stasis.block.exports import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    NBD_STATE_HOLE,
    NBD_STATE_ZERO,
    Status,
    dirty_status,
)
from stasis.block.origin import Origin, Request
from stasis.block.settings import PART_SHIFT
from stasis.linux import files
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.client import Client
from stasis.nbd.export import Export


class ImageExport(Export):
    """A snapshot image. `bitmaps` are (name, since) pairs, offered as qemu:dirty-bitmap:NAME from the held map."""

    can_multi_conn = True
    can_trim = True
    can_zero = True

    def __init__(
        self,
        name: str,
        origin: Origin,
        table: ChunkTable,
        storage_fd: int,
        changes: ChangeMap | None,
        bitmaps: Sequence[tuple[str, int]],
        connect: Callable[[], Client],
    ) -> None:
        self.name, self.description = name, f"stasis snapshot image {name}"
        self.size = table.size
        self.minimum_block = 1
        self.alignment = origin.sector if origin.direct else 1
        self._origin, self._table, self._storage_fd, self._changes = origin, table, storage_fd, changes
        self._bitmaps = dict(bitmaps) if changes is not None else {}
        self._connect = connect
        self._writer: Client | None = None

    # -- reading ------------------------------------------------------------------------------------

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        view = buffer.view
        unstored: list[Request] = []
        stored = False
        untouched = self._table.untouched
        for request in requests:
            if untouched(request[0], request[1]):
                unstored.append(request)
            else:
                stored |= self._gather(view, request, unstored)
        if unstored:
            self._origin.read(buffer, unstored)
            for request in unstored:
                if not untouched(request[0], request[1]):
                    stored |= self._gather(view, request, None)
        if stored:
            # Stored contents are only as good as the disk they went to: a failed writeback is known by now.
            files.writeback_error(self._storage_fd)
        if self._table.error:
            raise OSError(EIO, "the snapshot is corrupted")

    def _gather(self, view: memoryview, request: Request, unstored: list[Request] | None) -> bool:
        """Fill in what is stored of a request and note the rest. Tells whether the storage was read."""
        offset, length, position = request
        first, end = offset >> PART_SHIFT, -(-(offset + length) >> PART_SHIFT)
        stored = False
        for start, count, block in self._table.pieces(first, end):
            low = max(offset, start << PART_SHIFT)
            size = min(offset + length, (start + count) << PART_SHIFT) - low
            at = position + low - offset
            if block == 0:
                if unstored is not None:
                    unstored.append((low, size, at))
            elif block == ZERO:
                view[at : at + size] = bytes(size)
            else:
                self._read_storage(view[at : at + size], (block << PART_SHIFT) + low - (start << PART_SHIFT))
                stored = True
        return stored

    def _read_storage(self, place: memoryview, offset: int) -> None:
        done = os.preadv(self._storage_fd, [place], offset)
        if done != len(place):
            files.transfer_rest(os.preadv, self._storage_fd, [place], offset, done)

    # -- writing ------------------------------------------------------------------------------------

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        view = buffer.view
        self._hand_over(
            lambda client: client.write_many(
                [(offset, view[position : position + length]) for offset, length, position in requests]
            )
        )

    def trim(self, offset: int, length: int) -> Iterator[None]:
        return self.write_zeroes(offset, length, punch=True, fast=False)

    def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> Iterator[None]:
        step = 64 << 20
        for start in range(offset, offset + length, step):
            count = min(step, offset + length - start)
            self._hand_over(methodcaller("write_zeroes", start, count))
            yield

    def _hand_over(self, call: Callable[[Client], object]) -> None:
        """Let the worker do it. A worker that was restarted meanwhile is connected to once more."""
        if self._table.error:
            raise OSError(EIO, "the snapshot is corrupted")
        fresh = self._writer is None
        if self._writer is None:
            self._writer = self._connect()
        try:
            call(self._writer)
        except (ConnectionError, EOFError):
            self._writer = None
            if fresh:
                raise
            self._hand_over(call)

    def flush(self) -> None:
        """Nothing to do: an image lives as long as its snapshot, which ends with the boot."""

    # -- status -------------------------------------------------------------------------------------

    def contexts(self) -> Sequence[str]:
        return (BASE_ALLOCATION, ALLOCATION_DEPTH, *(DIRTY_BITMAP + name for name in self._bitmaps))

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        if context.startswith(DIRTY_BITMAP) and self._changes is not None:
            since = self._bitmaps[context.removeprefix(DIRTY_BITMAP)]
            return dirty_status(self._changes, since, True, offset, length)
        length = min(length, 1 << 30)
        status = Status(offset, length)
        depth = context == ALLOCATION_DEPTH
        for start, count, block in self._table.pieces(*part_range(offset, length)):
            low, high = max(offset, start << PART_SHIFT), min(offset + length, (start + count) << PART_SHIFT)
            if block == 0:
                complete = not self._origin_status(status, low, high, depth)
            elif block == ZERO:
                complete = not status.add(high, 1 if depth else NBD_STATE_HOLE | NBD_STATE_ZERO)
            else:
                complete = not status.add(high, 1 if depth else 0)
            if complete:
                break
        return status.extents

    def _origin_status(self, status: Status, low: int, high: int, depth: bool) -> bool:
        """Extents of a stretch that lay in the origin. One that was overwritten while we looked says data."""
        extents = list(self._origin.data_extents(low, high - low))
        if any(block for _, _, block in self._table.pieces(*part_range(low, high - low))):
            extents = [(low, high - low, True)]
        for start, count, data in extents:
            if depth:
                flags = 2 if data else 0
            else:
                flags = 0 if data else NBD_STATE_HOLE | NBD_STATE_ZERO
            if not status.add(start + count, flags):
                return False
        return True
