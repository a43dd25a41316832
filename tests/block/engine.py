# SPDX-License-Identifier: Apache-2.0
"""The block engine of one device inside the test's own process: origin, tracking, copy-on-write and image.

Everything is the real thing on real files; only the sockets between the processes are left out, so that a test
decides what happens between any two steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from errno import EIO
from pathlib import Path

from stasis.block.changemap import ChangeMap
from stasis.block.chunktable import ChunkTable
from stasis.block.cow import CopyOnWrite
from stasis.block.diffstorage import DiffStorage, private_descriptor
from stasis.block.exports import ImageWriter, OriginExport
from stasis.block.image import ImageExport
from stasis.block.opening import open_origin
from stasis.block.origin import Origin
from stasis.block.settings import PART_SIZE, Settings
from stasis.block.tracking import Tracker
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.export import Export

REGION_SHIFT = 20
SINCE = "qemu:dirty-bitmap:since"


def pread(export: Export, offset: int, length: int) -> bytes:
    """Read one range through an export."""
    return pread_many(export, [(offset, length)])[0]


def pread_many(export: Export, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read many ranges as one batch; the places in the buffer are odd ones."""
    requests, position = [], 0
    for offset, length in ranges:
        requests.append((offset, length, position))
        position += -(-length // export.alignment) * export.alignment
    with IoBuffer(position) as buffer:
        export.read(buffer, requests)
        return [bytes(buffer.view[at : at + length]) for _, length, at in requests]


def pwrite_many(export: Export, writes: Sequence[tuple[int, bytes | memoryview]], skew: int = 0) -> None:
    """Write many ranges as one batch, packed one behind the other from byte `skew` of the buffer on."""
    with IoBuffer(skew + sum(len(piece) for _, piece in writes)) as buffer:
        requests, position = [], skew
        for offset, piece in writes:
            buffer.view[position : position + len(piece)] = piece
            requests.append((offset, len(piece), position))
            position += len(piece)
        export.write(buffer, requests)


class InnerClient:
    """What the image server uses to reach its worker, without the socket between."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._writer = engine, engine.writer

    def _check(self) -> None:
        if self._engine.writer is not self._writer:
            raise ConnectionResetError("the worker died")

    def write_many(self, requests: Sequence[tuple[int, memoryview]]) -> None:
        self._check()
        pwrite_many(self._writer, requests)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._check()
        for _ in self._writer.write_zeroes(offset, length, punch=True, fast=False):
            pass


class Engine:
    """One device. `death` and `restart` replace its worker, the files stay."""

    def __init__(
        self,
        directory: Path,
        path: Path,
        *,
        buffered: bool = True,
        tracking_shift: int = 16,
        portion: int = 16 << 20,
        storage: str | None = None,
    ) -> None:
        self.directory, self.path = directory, path
        self.settings = replace(Settings(), diff_storage_minimum=portion)
        self.tracking_shift = tracking_shift
        self.storage_target = str(directory) if storage is None else storage
        self.origin = open_origin(str(path), buffered=buffered)
        self.failures: list[int] = []
        self.cow: CopyOnWrite | None = None
        self.image: ImageExport | None = None
        self._storage: DiffStorage | None = None
        self._reader: contextlib.ExitStack | None = None
        self._open(continuous=False)

    # -- the worker's life ------------------------------------------------------------------------

    def _open(self, *, continuous: bool) -> None:
        self.tracker, self.opening = Tracker.open(
            self.directory,
            self.origin.size,
            self.tracking_shift,
            REGION_SHIFT,
            self.origin.identity(),
            continuous=continuous,
        )
        self.export = OriginExport("origin", self.origin, self.tracker)
        self.writer = ImageWriter(self.export)

    @property
    def changes(self) -> ChangeMap:
        return self.tracker.changes

    def death(self) -> None:
        """The worker dies and the next one takes over, with the snapshot if there is one."""
        self.tracker.close()
        if self.cow is not None:
            self.cow.close()
        self._open(continuous=True)
        if self.cow is not None:
            self._resume()

    def restart(self) -> None:
        """The worker ends in order and another one starts."""
        self.origin.flush()
        self.tracker.finish(self.origin.identity())
        self.tracker.close()
        self._open(continuous=False)

    def close(self) -> None:
        self.drop()
        self.tracker.close()
        self.origin.close()

    # -- snapshots --------------------------------------------------------------------------------

    def take(self, chunk_shift: int, *, limit: int | None = None, since: int = 0) -> None:
        """Take a snapshot; `since` is the epoch its image's dirty bitmap tells of."""
        (self.directory / "table").unlink(missing_ok=True)
        self._storage = DiffStorage.create(self.storage_target, self.directory / "header", self.settings, limit=limit)
        table = ChunkTable.create(self.directory / "table", self.origin.size, chunk_shift)
        self.failures.clear()
        self.changes.prepare_switch()
        self.switched = self.tracker.switch()
        self._hold(table)
        self.changes.forget_undo()
        self.tracker.settle()
        self._open_image(since)

    def _resume(self) -> None:
        self._hold(ChunkTable.open(self.directory / "table", writable=True))

    def _hold(self, table: ChunkTable) -> None:
        assert self._storage is not None
        storage = DiffStorage(private_descriptor(self._storage.fd), self.directory / "header")
        self.cow = CopyOnWrite(self.origin, table, storage, failed=self.failures.append, low=self._low)
        self.export.cow = self.cow

    def _low(self) -> None:
        assert self.cow is not None
        storage = self.cow.storage
        if storage.is_low() and (growth := storage.request_growth()) is not None and growth[0] < growth[1]:
            storage.grow(growth[0], growth[1])

    def _open_image(self, since: int) -> None:
        assert self._storage is not None
        with contextlib.ExitStack() as stack:
            fds = [os.dup(self.origin.fd)]
            if self.origin.direct:
                fds.append(os.dup(self.origin.buffered_fd))
            origin = Origin(str(self.path), *fds)
            stack.callback(origin.close)
            table = ChunkTable.open(self.directory / "table")
            stack.callback(table.close)
            storage_fd = private_descriptor(self._storage.fd)
            stack.callback(os.close, storage_fd)
            changes = ChangeMap.open_readonly(self.directory / "map")
            stack.callback(changes.close)
            connect = lambda: InnerClient(self)  # noqa: E731
            bitmaps = [("since", since)]
            self.image = ImageExport("image", origin, table, storage_fd, changes, bitmaps, connect)  # type: ignore[arg-type]
            self._reader = stack.pop_all()

    def drop(self) -> None:
        """Destroy the snapshot, if there is one."""
        if self.cow is None or self._storage is None or self._reader is None:
            return
        self._reader.close()
        self.cow.close()
        self._storage.close()
        self.image = self.cow = self.export.cow = None
        self.changes.release_held()

    # -- what tests look at -----------------------------------------------------------------------

    def stored(self) -> int:
        """Bytes of the difference storage that are in use or leased."""
        assert self.cow is not None
        return self.cow.storage.fill().filled - PART_SIZE

    def limit(self) -> int:
        assert self.cow is not None
        return self.cow.storage.fill().limit - PART_SIZE


def extents(export: Export, context: str) -> Iterator[tuple[int, int, int]]:
    """(offset, length, flags) over the whole export, asked as a client would."""
    offset = 0
    while offset < export.size:
        answer = export.block_status(context, offset, export.size - offset)
        assert answer, f"{context} says nothing at {offset}"
        assert sum(length for length, _ in answer) <= export.size - offset
        for length, flags in answer:
            assert length > 0
            yield offset, length, flags
            offset += length


def is_corrupted(export: Export) -> bool:
    """Whether reading the image's first byte gives EIO."""
    try:
        pread(export, 0, 1)
    except OSError as error:
        assert error.errno == EIO
        return True
    return False
