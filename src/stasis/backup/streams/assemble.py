# SPDX-License-Identifier: Apache-2.0
"""Extents that ascend become chunks and an index; what they leave out is as in the backup that they build on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from stasis.backup.repo import ZERO, ChunkWriter, Manifest, Repository, StoredChunk
from stasis.backup.repo.index import NAMES_PER_SEGMENT
from stasis.backup.streams.rbddiff import Piece

__all__ = ["Assembler"]

_Settle = Callable[[int], None]


class Assembler:
    """Stores the chunks that pieces touch. Chunks are packed and stored by threads, in order of their places."""

    def __init__(self, repository: Repository, size: int, base: Manifest | None) -> None:
        self._size = size
        self._chunk_size = repository.chunk_size
        self._base = repository.index(base) if base else None
        self._builder = repository.index_builder(size, self._base)
        self._reader = repository.chunk_reader()
        self._crew = _Crew(repository)
        self._seam = self._find_seam()
        self._number = -1
        self._chunk = memoryview(b"")
        self.bytes_stored = 0

    def run(self, pieces: Iterable[Piece]) -> tuple[bytes, ...]:
        """Store everything; the names of the segments, for a manifest."""
        with self._crew:
            for offset, length, data in pieces:
                self._place(offset, length, data)
            self._pass_seam(self._builder.count)
            self._close_chunk()
            self._settle(0)
            return self._builder.finish()

    def _find_seam(self) -> int | None:
        """The chunk in which the shorter of device and base ends: its length changes, even if no piece touches it."""
        if self._base is None or self._base.size == self._size:
            return None
        number, inside = divmod(min(self._base.size, self._size), self._chunk_size)
        return number if inside else None

    def _place(self, offset: int, length: int, data: memoryview | None) -> None:
        position = 0
        while position < length:
            number, start = divmod(offset + position, self._chunk_size)
            count = min(self._length(number) - start, length - position)
            whole = count == self._length(number)
            if data is None and whole:
                position += self._zero_chunks(number, length - position)
                continue
            chunk = self._open_chunk(number, whole=whole)
            chunk[start : start + count] = bytes(count) if data is None else data[position : position + count]
            position += count

    def _zero_chunks(self, first: int, length: int) -> int:
        """Whole chunks of zeroes; the bytes that these are. Those that have been zeroes stay as they are."""
        self._pass_seam(first)
        self._close_chunk()
        stop = first + length // self._chunk_size
        if first * self._chunk_size + length == self._size:
            stop = -(-self._size // self._chunk_size)
        for number, name in enumerate(self._base.names(first, stop - first) if self._base else (), first):
            if number % NAMES_PER_SEGMENT == 0:
                self._settle(0)
                self._builder.settled(number)
            if name != ZERO:
                self._builder.set(number, ZERO)
        if self._seam is not None and self._seam < stop:
            self._seam = None
        return min(stop * self._chunk_size, self._size) - first * self._chunk_size

    def _open_chunk(self, number: int, *, whole: bool) -> memoryview:
        """The chunk to write into, with what it held before unless it is replaced as a whole."""
        if number == self._number:
            return self._chunk
        self._pass_seam(number)
        self._close_chunk()
        if number == self._seam:
            self._seam = None
        self._number, self._chunk = number, self._crew.buffer(self._settle)
        if not whole:
            self._load(number)
        return self._chunk

    def _pass_seam(self, number: int) -> None:
        """Store the seam in its turn, before a chunk behind it."""
        if self._seam is not None and self._seam < number:
            self._open_chunk(self._seam, whole=False)

    def _load(self, number: int) -> None:
        before = 0
        if self._base is not None and number < self._base.count:
            before = self._base.chunk_length(number)
            self._reader.fetch(self._base.name(number), self._chunk[:before])
        self._chunk[before:] = bytes(len(self._chunk) - before)

    def _close_chunk(self) -> None:
        if self._number >= 0:
            self._crew.store(self._number, self._chunk, self._length(self._number))
            self._number = -1

    def _settle(self, room: int) -> None:
        """Take over what was stored until at most `room` chunks are under way."""
        for number, stored in self._crew.finished(room):
            self._builder.set(number, stored.name)
            self.bytes_stored += stored.stored_bytes
            self._builder.settled(number)

    def _length(self, number: int) -> int:
        return min(self._chunk_size, self._size - number * self._chunk_size)


class _Crew:
    """Threads that store chunks, and the buffers that they have at a time."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._own = threading.local()
        self._limit = repository.parallelism + 1
        self._free: list[memoryview] = []
        self._made = 0
        self._pool = ThreadPoolExecutor(repository.parallelism, thread_name_prefix="store")
        self._pending: deque[tuple[int, memoryview, Future[StoredChunk]]] = deque()

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def buffer(self, settle: _Settle) -> memoryview:
        """Memory for a chunk; waits until there is some."""
        if not self._free and self._made == self._limit:
            settle(self._limit - 2)
        if self._free:
            return self._free.pop()
        self._made += 1
        return memoryview(bytearray(self._repository.chunk_size))

    def store(self, number: int, buffer: memoryview, length: int) -> None:
        """Have a chunk stored; the buffer is the crew's again."""
        self._pending.append((number, buffer, self._pool.submit(self._store, buffer[:length])))

    def finished(self, room: int) -> list[tuple[int, StoredChunk]]:
        """The oldest chunks, waited for until at most `room` are left. Raises what storing one raised."""
        done = []
        while len(self._pending) > room:
            number, buffer, future = self._pending.popleft()
            done.append((number, future.result()))
            self._free.append(buffer)
        return done

    def _store(self, data: memoryview) -> StoredChunk:
        writer: ChunkWriter | None = getattr(self._own, "writer", None)
        if writer is None:
            writer = self._own.writer = self._repository.chunk_writer()
        return writer.store(data)
