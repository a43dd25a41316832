# SPDX-License-Identifier: Apache-2.0
"""Restoring a backup to a stream: a pipe, a socket or standard output, from its first byte to its last.

Threads fetch ahead, each into a buffer of its own; the calling thread writes, in order. A signal finds it in write(2)
and ends it there, however slow the reader is.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.backup.repo.chunks import ChunkReader
from stasis.backup.repo.index import ZERO
from stasis.backup.repo.manifest import Manifest
from stasis.backup.restore.batches import read_index
from stasis.backup.restore.job import RestoreResult, readable_errors
from stasis.linux.iobuffer import IoBuffer

__all__ = ["restore_to_stream"]

WRITE_BYTES = 1 << 20
MOST_WAITING = 1024  # zeroes need no slot, but a place in the queue


def restore_to_stream(repository: Repository, manifest: Manifest, descriptor: int,
                      progress: Progress | None = None) -> RestoreResult:
    """Write a backup to an open descriptor. Nothing is written that was not checked against its digest before.

    Raises DamagedError when an object of the repository is missing or altered: the stream ends before it. Raises
    BrokenPipeError when nobody reads any more, and StorageError.
    """
    started = time.monotonic()
    with repository.lock_shared("restore"), readable_errors("the stream"), ExitStack() as stack:
        index = repository.index(manifest)
        read_index(index)
        shown = progress or Progress()
        shown.phase("restoring", manifest.size)
        ahead = stack.enter_context(_Ahead(repository))
        for data in ahead.chunks(_with_lengths(index.names(), manifest)):
            _write_all(descriptor, data)
            shown.add(len(data))
    return RestoreResult(
        backup=manifest.id, target="-", size=manifest.size, bytes_written=manifest.size, bytes_zeroed=0,
        bytes_unchanged=0, bytes_verified=0, chunks_fetched=ahead.fetched, chunks_sampled=0, sample_seed=None,
        position_at_start=0, seconds=time.monotonic() - started,
    )


def _with_lengths(names: Iterator[bytes], manifest: Manifest) -> Iterator[tuple[bytes, int]]:
    """(name, length in bytes) of each chunk."""
    for number, name in enumerate(names):
        yield name, min(manifest.chunk_size, manifest.size - number * manifest.chunk_size)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data[:WRITE_BYTES]) :]


class _Slot:
    """A reader and a buffer, used by one thread at a time."""

    def __init__(self, repository: Repository) -> None:
        self.reader: ChunkReader = repository.chunk_reader()
        self.buffer = IoBuffer(repository.chunk_size)

    def fetch(self, name: bytes, length: int) -> memoryview:
        data = self.buffer.view[:length]
        self.reader.fetch(name, data)
        return data


class _Ahead:
    """Fetches chunks ahead of their use, in a bounded number of slots; a context manager."""

    def __init__(self, repository: Repository) -> None:
        # One slot more than threads: while one is written all threads have one to fill.
        self._slots = [_Slot(repository) for _ in range(repository.parallelism + 1)]
        self._zeroes = memoryview(bytes(repository.chunk_size))
        self._pool = ThreadPoolExecutor(repository.parallelism, thread_name_prefix="restore")
        self.fetched = 0

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for slot in self._slots:
            slot.buffer.close()

    def chunks(self, wanted: Iterator[tuple[bytes, int]]) -> Iterator[memoryview]:
        """The data of each (name, length), in order; valid until the next."""
        free, waiting = list(self._slots), deque[tuple[_Slot | None, Future[memoryview] | int]]()
        for name, length in wanted:
            if name == ZERO:
                waiting.append((None, length))
            else:
                slot = free.pop()
                waiting.append((slot, self._pool.submit(slot.fetch, name, length)))
                self.fetched += 1
            while waiting and (not free or waiting[0][0] is None or len(waiting) > MOST_WAITING):
                yield from self._oldest(waiting, free)
        while waiting:
            yield from self._oldest(waiting, free)

    def _oldest(self, waiting: deque[tuple[_Slot | None, Future[memoryview] | int]],
                free: list[_Slot]) -> Iterator[memoryview]:
        slot, coming = waiting.popleft()
        if isinstance(coming, int):
            yield self._zeroes[:coming]
            return
        data = coming.result()
        yield data
        data.release()
        if slot is not None:
            free.append(slot)
