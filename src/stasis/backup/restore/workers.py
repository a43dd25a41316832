# SPDX-License-Identifier: Apache-2.0
"""What a thread of a restore does with a batch: write it, write what differs, or compare it with the target.

Each worker has its own reader and buffers, made once: a restore takes as much memory at 10 TiB as at 10 MiB.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from stasis.backup.repo import Repository
from stasis.backup.restore.batches import Batch, Chunk
from stasis.backup.restore.compare import PIECE_BYTES, differing_runs, nonzero_runs, read_into
from stasis.block.copy.target import WRITE_SIZE, Target
from stasis.errors import StasisError, VerifyError
from stasis.linux.iobuffer import IoBuffer

__all__ = ["Counts", "DifferenceWriter", "ReadBack", "Tally", "WholeWriter"]

@dataclass(slots=True)
class Counts:
    """What was done, in bytes of the target; chunks_fetched counts chunks."""

    bytes_written: int = 0
    bytes_zeroed: int = 0
    bytes_unchanged: int = 0
    chunks_fetched: int = 0


class Tally:
    """The counts of all threads."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._lock = threading.Lock()

    def add(self, done: Counts) -> None:
        with self._lock:
            total = self.counts
            total.bytes_written += done.bytes_written
            total.bytes_zeroed += done.bytes_zeroed
            total.bytes_unchanged += done.bytes_unchanged
            total.chunks_fetched += done.chunks_fetched


class WholeWriter:
    """Writes every chunk, zeroes as holes where the target can have them."""

    def __init__(self, repository: Repository, target: Target, tally: Tally) -> None:
        self._reader = repository.chunk_reader()
        self._target = target
        self._tally = tally
        self._buffer = IoBuffer(repository.chunk_size)

    def handle(self, batch: Batch) -> None:
        done = Counts(chunks_fetched=len(batch.chunks))
        for chunk in batch.chunks:
            self._reader.fetch(chunk.name, self._buffer.view[: chunk.length])
            done.bytes_zeroed += self._target.write(chunk.offset, self._buffer, 0, chunk.length)
        self._target.zero(batch.zeroes)
        done.bytes_zeroed += batch.length - batch.chunk_bytes
        done.bytes_written = batch.length - done.bytes_zeroed
        self._tally.add(done)

    def abort(self) -> None:
        """A chunk under way is finished: that takes a moment."""

    def close(self) -> None:
        self._buffer.close()


class Stranger(Protocol):
    """Called with a chunk whose place in the target holds neither the base nor what is restored."""

    def __call__(self, chunk: Chunk, /) -> StasisError: ...


class DifferenceWriter:
    """Reads what the target holds, and fetches and writes only what is not there already.

    on_stranger: the error to raise where a chunk has a base and the target holds neither that nor the chunk.
    """

    def __init__(self, repository: Repository, target: Target, tally: Tally,
                 on_stranger: Stranger | None = None) -> None:
        self._reader = repository.chunk_reader()
        self._name = repository.chunk_name
        self._target = target
        self._tally = tally
        self._on_stranger = on_stranger
        self._buffer = IoBuffer(repository.chunk_size)
        self._found = IoBuffer(max(repository.chunk_size, PIECE_BYTES))

    def handle(self, batch: Batch) -> None:
        done = Counts()
        for chunk in batch.chunks:
            self._handle_chunk(chunk, done)
        for offset, length in batch.zeroes:
            self._zero(offset, length, done)
        done.bytes_unchanged = batch.length - done.bytes_written - done.bytes_zeroed
        self._tally.add(done)

    def _handle_chunk(self, chunk: Chunk, done: Counts) -> None:
        found = self._found.view[: chunk.length]
        read_into(self._target.descriptor, found, chunk.offset)
        name = self._name(found)
        if name == chunk.name:
            return
        wanted = self._buffer.view[: chunk.length]
        self._reader.fetch(chunk.name, wanted)
        done.chunks_fetched += 1
        if self._on_stranger is not None and not self._is_expected(name, chunk, wanted):
            raise self._on_stranger(chunk)
        for start, count in differing_runs(self._buffer.address, self._found.address, chunk.length):
            self._write(chunk.offset + start, start, count, done)

    def _is_expected(self, name: bytes, chunk: Chunk, wanted: memoryview) -> bool:
        """Whether the target holds the base, or the chunk itself: the name of a delta is none of its content."""
        return (chunk.base in (None, name) or self._name(wanted) == name
                or self._reader.content_name(chunk.base, chunk.length) == name)

    def _write(self, offset: int, start: int, count: int, done: Counts) -> None:
        zeroed = 0
        if count < WRITE_SIZE:  # too short for a hole
            self._target.write_data(self._buffer.view[start : start + count], offset)
        else:
            zeroed = self._target.write(offset, self._buffer, start, count)
        done.bytes_zeroed += zeroed
        done.bytes_written += count - zeroed

    def _zero(self, offset: int, length: int, done: Counts) -> None:
        target = self._target
        sparse = not target.is_block_device
        for start, count in nonzero_runs(target.descriptor, offset, length, self._found, sparse=sparse):
            target.zero([(start, count)])
            done.bytes_zeroed += count

    def abort(self) -> None:
        """A chunk under way is finished: that takes a moment."""

    def close(self) -> None:
        self._buffer.close()
        self._found.close()


class ReadBack:
    """Compares what the target holds with the names of the chunks; VerifyError at the first that differs.

    explanation, hint: what the difference means, and what to do, for the error.
    """

    def __init__(self, repository: Repository, target: Target, explanation: str, hint: str) -> None:
        self._name = repository.chunk_name
        self._reader = repository.chunk_reader()
        self._target = target
        self._explanation = explanation
        self._hint = hint
        self._found = IoBuffer(max(repository.chunk_size, PIECE_BYTES))

    def handle(self, batch: Batch) -> None:
        target = self._target
        for chunk in batch.chunks:
            found = self._found.view[: chunk.length]
            read_into(target.descriptor, found, chunk.offset)
            if self._name(found) != self._reader.content_name(chunk.name, chunk.length):
                raise self._difference(chunk.offset, chunk.length)
        for offset, length in batch.zeroes:
            sparse = not target.is_block_device
            for start, count in nonzero_runs(target.descriptor, offset, length, self._found, sparse=sparse):
                raise self._difference(start, count)

    def _difference(self, offset: int, length: int) -> VerifyError:
        return VerifyError(f"{self._target.path} differs in the {length} bytes at offset {offset}: "
                           f"{self._explanation}", hint=self._hint)

    def abort(self) -> None:
        """A chunk under way is finished: that takes a moment."""

    def close(self) -> None:
        self._found.close()
