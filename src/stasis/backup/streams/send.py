# SPDX-License-Identifier: Apache-2.0
"""A backup as a stream: all of it, or what differs from an earlier one, down to blocks of 4 KiB."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, cast

import zstandard

from stasis.backup.progress import Progress
from stasis.backup.repo import ZERO, Index, Manifest, Repository
from stasis.backup.serve.cache import ChunkCache, Key
from stasis.backup.serve.diff import Difference, diff
from stasis.backup.streams import describe
from stasis.backup.streams.rbddiff import Head, StreamWriter
from stasis.errors import UsageError

__all__ = ["SendResult", "send"]

LEVEL = 3
AHEAD = 8
"""Chunks that are fetched before they are written."""
MOST_THREADS = 4


@dataclass(frozen=True)
class SendResult:
    """What was sent, in bytes. bytes_sent: what went over the wire."""

    id: str
    base: str | None
    size: int
    bytes_data: int
    bytes_zero: int
    bytes_sent: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def send(repository: Repository, backup: Manifest, base: Manifest | None, sink: BinaryIO,
         progress: Progress | None = None) -> SendResult:
    """Write a backup, or what differs in it from `base`, to the sink.

    Raises UsageError when `base` is of another device, DamagedError for what cannot be read, OSError of the sink.
    """
    if base is not None and (base.host, base.device) != (backup.host, backup.device):
        raise UsageError(f"backup {base.id[:12]} is of {base.device} on {base.host}, not of {backup.device} on "
                         f"{backup.host}", hint="name an earlier backup of the same device")
    started = time.monotonic()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    packer = zstandard.ZstdCompressor(level=LEVEL, threads=threads, write_checksum=True)
    head = Head(backup.id, backup.size, base.id if base else None, describe.encode(backup, base))
    counted = _Counted(sink)
    packed = packer.stream_writer(cast(BinaryIO, counted), closefd=False)
    with repository.lock_shared("send"):
        sender = _Sender(repository, backup, base, StreamWriter(packed, head), progress or Progress())
        sender.run()
    packed.flush(zstandard.FLUSH_FRAME)  # not after an error: what is cut off must look so
    sink.flush()
    return SendResult(backup.id, base.id if base else None, backup.size, sender.bytes_data, sender.bytes_zero,
                      counted.total, round(time.monotonic() - started, 3))


class _Counted:
    """Counts what goes to a file."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self.total = 0

    def write(self, data: bytes) -> int:
        self.total += len(data)
        return self._sink.write(data)


class _Sender:
    def __init__(self, repository: Repository, backup: Manifest, base: Manifest | None, writer: StreamWriter,
                 progress: Progress) -> None:
        self._repository = repository
        self._index = repository.index(backup)
        self._base = repository.index(base) if base else None
        self._writer = writer
        self._progress = progress
        self._buffer = memoryview(bytearray(backup.chunk_size))
        self.bytes_data = 0
        self.bytes_zero = 0

    def run(self) -> None:
        self._progress.phase("sending", self._index.size)
        repository, done = self._repository, 0
        with closing(ChunkCache(repository.chunk_reader, self._index.chunk_size,
                                threads=repository.parallelism)) as cache:
            for extent in self._ahead(cache):
                self._send(cache, extent)
                self._progress.add(extent.offset + extent.length - done)
                done = extent.offset + extent.length
        self._writer.finish()
        self._progress.add(self._index.size - done)

    def _differences(self, cache: ChunkCache) -> Iterator[Difference]:
        """Extents to send, data within one chunk each."""
        if self._base is None:
            nothing = Index(0, self._index.chunk_size, (), _no_segments)
            found: Iterator[Difference] = (one for one in diff(nothing, self._index) if not one.zero)
        else:
            found = diff(self._base, self._index, contents=cache)
        for extent in found:
            yield from [extent] if extent.zero else self._cut(extent)

    def _cut(self, extent: Difference) -> Iterator[Difference]:
        offset, end, size = extent.offset, extent.offset + extent.length, self._index.chunk_size
        while offset < end:
            length = min(size - offset % size, end - offset)
            yield Difference(offset, length, False)
            offset += length

    def _ahead(self, cache: ChunkCache) -> Iterator[Difference]:
        """The same, some time after their chunks were asked for."""
        waiting: deque[Difference] = deque()
        for extent in self._differences(cache):
            if (key := self._key(extent)) is not None:
                cache.prefetch(key)
            waiting.append(extent)
            if len(waiting) > min(AHEAD, cache.window // 4):
                yield waiting.popleft()
        yield from waiting

    def _send(self, cache: ChunkCache, extent: Difference) -> None:
        key = self._key(extent)
        if key is None:
            self._writer.zero(extent.offset, extent.length)
            self.bytes_zero += extent.length
            return
        cache.copy([(key, extent.offset % self._index.chunk_size, extent.length, 0)], self._buffer)
        self._writer.data(extent.offset, self._buffer[: extent.length])
        self.bytes_data += extent.length

    def _key(self, extent: Difference) -> Key | None:
        """The chunk that the extent lies in; None for zeroes."""
        number = extent.offset // self._index.chunk_size
        if extent.zero or (name := self._index.name(number)) == ZERO:
            return None
        return name, self._index.chunk_length(number)


def _no_segments(name: bytes, length: int) -> bytes:
    raise IndexError(name)
