# SPDX-License-Identifier: Apache-2.0
"""A tracked disk in memory, whose snapshots are sources, and whose tracking can be made to lie and reads to fail."""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Sequence

from stasis.backup.repo import Manifest, Repository
from stasis.backup.source import Extent, Mark
from stasis.block.copy.plan import merge
from stasis.errors import GenerationError

__all__ = ["BLOCK", "FakeDisk", "FakeSnapshot", "restored"]

BLOCK = 4096
HIGHEST = 255


class FakeDisk:
    """A disk with a change map as served devices have one: a number per block, and a generation."""

    def __init__(self, data: bytes, name: str = "disk") -> None:
        self.name, self.data = name, bytearray(data)
        self.generation, self.number = str(uuid.uuid4()), 1
        self.changes = [0] * -(-len(data) // BLOCK)
        self.identity = "inode 7"
        self.distrusted: list[str] = []

    def write(self, offset: int, data: bytes, *, seen: bool = True) -> None:
        """Write; with `seen` false behind the back of tracking."""
        self.data[offset : offset + len(data)] = data
        if seen:
            for block in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
                self.changes[block] = self.number

    def new_generation(self) -> None:
        self.generation, self.number, self.changes = str(uuid.uuid4()), 1, [0] * len(self.changes)

    def resize(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")
        self.changes = [0] * -(-size // BLOCK)
        self.new_generation()

    def snapshot(self, taken: float | None = None) -> FakeSnapshot:
        """Ends the epoch, as a take does; the number wraps into a new generation after 255."""
        taken_snapshot = FakeSnapshot(self, taken)
        if self.number == HIGHEST:
            self.new_generation()
        else:
            self.number += 1
        return taken_snapshot


class FakeSnapshot:
    """The disk as it was; `reads` is what was read of it, `before_read` is called before each read."""

    kind = "served"
    path = "/dev/fake"
    block_size = BLOCK

    def __init__(self, disk: FakeDisk, taken: float | None) -> None:
        self.disk, self.name = disk, disk.name
        self.data = bytes(disk.data)
        self.size: int | None = len(self.data)
        self.identity = disk.identity
        self.mark: Mark | None = Mark(disk.generation, disk.number)
        self.taken: float | None = time.time() if taken is None else taken
        self.held = list(disk.changes)
        self.reads: list[Extent] = []
        self.readers = 0
        self.before_read: Callable[[Extent], None] = lambda _: None

    def changed_since(self, mark: Mark) -> list[Extent]:
        assert self.mark is not None
        if mark.generation != self.mark.generation or mark.number > self.mark.number:
            raise GenerationError(f"the map's generation is {self.mark.generation}, not {mark.generation}")
        found = [(at * BLOCK, BLOCK) for at, number in enumerate(self.held) if number > mark.number]
        return [(at, min(length, len(self.data) - at)) for at, length in merge(found)]

    def zero_extents(self) -> list[Extent]:
        return merge((at, min(BLOCK, len(self.data) - at)) for at in range(0, len(self.data), BLOCK)
                     if not any(self.data[at : at + BLOCK]))

    def open_reader(self) -> FakeReader:
        self.readers += 1
        return FakeReader(self)

    def disturbed(self) -> str:
        return ""

    def distrust(self, reason: str) -> None:
        self.disk.distrusted.append(reason)
        self.disk.changes = [self.disk.number] * len(self.disk.changes)


class FakeReader:
    def __init__(self, source: FakeSnapshot) -> None:
        self.source = source

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        position = 0
        for offset, length in extents:
            self.source.before_read((offset, length))
            self.source.reads.append((offset, length))
            buffer[position : position + length] = self.source.data[offset : offset + length]
            position += length

    def abort(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self.source.readers -= 1


def bad_sector(at: int, length: int = BLOCK) -> Callable[[Extent], None]:
    """A `before_read` for a disk with an unreadable place."""

    def check(extent: Extent) -> None:
        if extent[0] < at + length and at < extent[0] + extent[1]:
            raise OSError(errno.EIO, "medium error")

    return check


def restored(repository: Repository, manifest: Manifest) -> bytes:
    """All bytes of a backup."""
    index, reader = repository.index(manifest), repository.chunk_reader()
    data = bytearray(manifest.size)
    for number, name in enumerate(index.names()):
        start = number * manifest.chunk_size
        reader.fetch(name, memoryview(data)[start : start + index.chunk_length(number)])
    return bytes(data)
