# SPDX-License-Identifier: Apache-2.0
"""What the threads of a backup do: read batches of chunks, store them, and enter their names into the index.

Each thread has a reader, a buffer and a chunk writer of its own, and does everything for its batch: reading, hashing,
compressing, encrypting and storing all run without the interpreter lock, so nothing is gained by handing data from one
thread to another, and memory is bounded by threads times batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stasis.backup.job.parts import DeltaMaker, Part
from stasis.backup.job.plan import ChunkRange, chunk_extents
from stasis.backup.job.reading import ReadErrors, read_chunks
from stasis.backup.job.resume import ResumeFile
from stasis.backup.job.work import Batch, open_ended, pack
from stasis.backup.source import Extent, PointInTimeSource
from stasis.backup.sources.stream import StreamSource
from stasis.block.copy.transfer import Crew
from stasis.linux.iobuffer import IoBuffer

if TYPE_CHECKING:
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Index, IndexBuilder, Repository, StoredChunk

__all__ = ["ZERO", "Counters", "Pipeline", "RateLimit", "Task", "lanes_and_window"]

# Bytes that all threads may hold: a batch to read, and up to three chunks in a writer (compressed, sealed, staged).
MEMORY_BUDGET = 128 << 20
WINDOW = 4 << 20
ALL_WINDOWS = 32 << 20
WRITER_CHUNKS = 3
STEPS_PER_SECOND = 8
ZERO = bytes(32)
Run = tuple[int, list[bytes]]
"""First chunk and names of chunks one behind the other."""


@dataclass
class Counters:
    """What a pipeline did. Bytes and chunks."""

    bytes_read: int = 0
    bytes_stored: int = 0
    chunks_new: int = 0
    deltas: int = 0
    chunks_resumed: int = 0
    unreadable: list[Extent] = field(default_factory=list)

    def count(self, stored: StoredChunk) -> None:
        """Count an object that went to the repository."""
        if stored.new:
            self.chunks_new += 1
            self.bytes_stored += stored.stored_bytes

    def add(self, other: Counters) -> None:
        """Add what a thread did."""
        self.bytes_read += other.bytes_read
        self.bytes_stored += other.bytes_stored
        self.chunks_new += other.chunks_new
        self.deltas += other.deltas
        self.chunks_resumed += other.chunks_resumed
        self.unreadable += other.unreadable


def lanes_and_window(chunk_size: int, parallelism: int) -> tuple[int, int]:
    """(threads, chunks per batch) that keep within the memory budget."""
    lanes = max(1, min(parallelism, MEMORY_BUDGET // ((1 + WRITER_CHUNKS) * chunk_size)))
    return lanes, max(1, min(WINDOW, ALL_WINDOWS // lanes) // chunk_size)


class RateLimit:
    """Lets bytes pass at a rate, all threads together."""

    def __init__(self, bytes_per_second: int) -> None:
        self.rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()
        self._given_up = threading.Event()

    def wait(self, length: int) -> None:
        """Return when `length` more bytes may be read, or when the wait was given up."""
        with self._lock:
            start = max(self._free_at, time.monotonic())
            self._free_at = start + length / self.rate
        delay = start - time.monotonic()
        if delay > 0:
            self._given_up.wait(delay)

    def give_up(self) -> None:
        """Let nobody wait any more."""
        self._given_up.set()


@dataclass
class Task:
    """One source's chunks and where their names go. `size` is None where only the end of the source tells.

    parent: the index of the backup that parts are deltas against, None where there are no parts.
    """

    source: PointInTimeSource
    builder: IndexBuilder
    size: int | None
    chunk_size: int
    errors: ReadErrors
    resume: ResumeFile | None = None
    limit: RateLimit | None = None
    parent: Index | None = None


class Pipeline:
    """One pass over the chunks of a source. `run` is called once, from the thread that gets the signals."""

    def __init__(self, repository: Repository, task: Task, progress: Progress) -> None:
        self.counters = Counters()
        self.task, self.repository, self.progress = task, repository, progress
        self.lanes, self.window = lanes_and_window(task.chunk_size, repository.parallelism)
        if task.limit is not None:  # in small steps, lest a slow rate becomes long pauses
            self.window = max(1, min(self.window, task.limit.rate // STEPS_PER_SECOND // task.chunk_size))
        self.lock = threading.Lock()

    def run(self, reads: Iterable[ChunkRange], parts: Iterable[Part] = ()) -> None:
        """Read and store the chunks, and parts of others; the whole stream if that has no known size.

        Raises what a thread raised first. In each case no thread runs any more when it returns.
        """
        crew: Crew[Batch] = Crew(lambda: _Lane(self), self.lanes)
        crew.run(self._batches(reads, parts), 0, lambda _: self.task.builder.settled(self._final(crew.position)))

    def count(self, done: Counters) -> None:
        """Add what a thread did. May be called from any thread."""
        with self.lock:
            self.counters.add(done)
        self.progress.add(done.bytes_read, items=0)

    def _final(self, position: int) -> int:
        """Chunks below this are final. Batches behind the end of a stream settle nothing."""
        if isinstance(self.task.source, StreamSource):
            return min(position, self.task.source.position // self.task.chunk_size)
        return position

    def _batches(self, reads: Iterable[ChunkRange], parts: Iterable[Part]) -> Iterator[Batch]:
        if not isinstance(self.task.source, StreamSource):
            yield from pack(reads, parts, self.window, self.task.chunk_size)
            return
        for batch in open_ended(self.window):
            if self.task.source.size is not None:
                return
            yield batch


class _Lane:
    """One thread's part: called by the crew."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._task = pipeline, pipeline.task
        self._reader = self._task.source.open_reader()
        self._buffer = IoBuffer(pipeline.window * self._task.chunk_size)
        self._writer = pipeline.repository.chunk_writer()
        parent = self._task.parent
        self._deltas = None if parent is None else DeltaMaker(pipeline.repository, parent, self._writer)

    def handle(self, batch: Batch) -> None:
        """Read and store a batch, and enter the names."""
        runs: list[Run] = []
        reads = [self._take_over(batch.reads, runs)]
        if batch.parts and self._deltas is not None:
            reads += [[(number, 1)] for number in self._read_and_store_parts(batch.parts, self._deltas)]
        readable = False not in [self._read_and_store(some, runs) for some in reads if some]
        enter = self._task.builder.set
        for first, names in runs:
            for number, name in enumerate(names, first):
                enter(number, name)
            if self._task.resume is not None and readable:
                self._task.resume.note(first, names)

    def abort(self) -> None:
        """End a read or a wait that is under way."""
        if self._task.limit is not None:
            self._task.limit.give_up()
        self._reader.abort()

    def close(self) -> None:
        """Give back reader and buffer."""
        self._buffer.close()
        self._reader.close()

    def _take_over(self, reads: list[ChunkRange], runs: list[Run]) -> list[ChunkRange]:
        """Chunks that an interrupted run stored, and that are still there, need not be read; returns the others."""
        resume = self._task.resume
        if resume is None or not resume.has_names:
            return reads
        left: list[ChunkRange] = []
        for first, count in reads:
            for number, name in enumerate(resume.names(first, count), first):
                if name is not None and self._writer.store_known(name):
                    runs.append((number, [name]))
                elif left and sum(left[-1]) == number:
                    left[-1] = (left[-1][0], left[-1][1] + 1)
                else:
                    left.append((number, 1))
        self._pipeline.count(Counters(chunks_resumed=len(runs)))
        self._pipeline.progress.skip(len(runs) * self._task.chunk_size)
        return left

    def _read_and_store(self, reads: Sequence[ChunkRange], runs: list[Run]) -> bool:
        """Read chunks and store them; whether all of them could be read: the next run shall try others again."""
        task = self._task
        extents, unreadable = self._read(reads)
        done = Counters(unreadable=unreadable)
        # Hot: once per chunk, in all threads.
        store, view, chunk_size, position = self._writer.store, self._buffer.view, task.chunk_size, 0
        for (first, _), (_, size) in zip(reads, extents, strict=True):
            names = []
            for at in range(position, position + size, chunk_size):
                stored = store(view[at : min(at + chunk_size, position + size)])
                names.append(stored.name)
                done.count(stored)
            runs.append((first, names))
            position += size
        done.bytes_read = position
        self._pipeline.count(done)
        return not unreadable

    def _read_and_store_parts(self, parts: Sequence[Part], deltas: DeltaMaker) -> list[int]:
        """Store parts and enter them into the index; returns the chunks that are to be stored whole after all."""
        task, position = self._task, 0
        extents = [extent for part in parts for extent in part.extents]
        done = Counters(bytes_read=sum(part.length for part in parts))
        if task.limit is not None:
            task.limit.wait(done.bytes_read)
        done.unreadable = read_chunks(self._reader, extents, self._buffer.view, task.chunk_size, task.errors)
        whole, made = [], []
        for part in parts:
            one = deltas.make(part, self._buffer.view[position : position + part.length])
            position += part.length
            if one is None:
                whole.append(part.number)
            elif isinstance(one, tuple):
                made.append(one)
            else:
                task.builder.set(part.number, one.name)
                done.count(one)
        for stored, placed in deltas.store(made):
            done.count(stored)
            done.deltas += len(placed)
            for number, name, below in placed:
                task.builder.set(number, name, below)
        self._pipeline.count(done)
        return whole

    def _read(self, reads: Sequence[ChunkRange]) -> tuple[list[Extent], list[Extent]]:
        """Fill the buffer; (what was read, what of it could not be read)."""
        task = self._task
        whole = chunk_extents(reads, task.chunk_size, 1 << 62 if task.size is None else task.size)
        if task.limit is not None:
            task.limit.wait(sum(length for _, length in whole))
        if isinstance(task.source, StreamSource):
            (offset, length), = whole
            return [(offset, task.source.read_turn(offset, self._buffer.view[:length]))], []
        return whole, read_chunks(self._reader, whole, self._buffer.view, task.chunk_size, task.errors)
