# SPDX-License-Identifier: Apache-2.0
"""Does what tracking calls unchanged still hold what the parent holds? A random sample is read and compared.

Chunks that tracking calls unchanged as a whole are compared by their names, which are digests of their contents: one
read of the source, none of the repository. Only where writes are spread so wide that there are few such chunks, single
blocks are compared with what the parent's chunk has at their place.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stasis.backup.job.plan import chunk_extents, touched_chunks, untouched_chunks
from stasis.backup.source import Extent, PointInTimeSource, SourceReader
from stasis.block.copy.plan import complement, sample_blocks
from stasis.linux.iobuffer import IoBuffer

if TYPE_CHECKING:
    from stasis.backup.repo import Index, Repository

__all__ = ["Sample", "SampleOptions", "check_sample"]

WINDOW = 4 << 20


@dataclass(frozen=True)
class SampleOptions:
    """share: of the unchanged chunks, 0 to 1; 0 checks nothing. minimum: chunks at least. seed: None draws one."""

    share: float = 0.001
    minimum: int = 16
    seed: int | None = None


@dataclass(frozen=True)
class Sample:
    """What was compared: bytes, the seed that draws the same sample again, and the places that differ."""

    bytes_compared: int
    seed: int
    different: tuple[Extent, ...] = ()


def check_sample(source: PointInTimeSource, repository: Repository, parent: Index, changed: Sequence[Extent],
                 options: SampleOptions, seed: int, given_up: threading.Event) -> Sample:
    """Compare a sample of what is not in `changed` with the parent. Raises OSError when the source cannot be read.

    given_up: set from another thread when nobody wants the answer any more.
    """
    if options.share <= 0:
        return Sample(0, seed)
    checker = _Checker(source, repository, parent, given_up)
    touched = touched_chunks(changed, parent.chunk_size)
    whole = chunk_extents(untouched_chunks(touched, parent.count), parent.chunk_size, parent.size)
    chunks = sample_blocks(whole, parent.chunk_size, options.share, options.minimum, seed)
    blocks: list[Extent] = []
    if len(chunks) < options.minimum:
        unit = max(512, min(source.block_size, parent.chunk_size))
        gaps = complement(list(changed), parent.size)
        blocks = sample_blocks(gaps, unit, options.share, options.minimum - len(chunks), seed)
    with closing(source.open_reader()) as reader:
        different = checker.compare_chunks(reader, chunks) + checker.compare_blocks(reader, blocks)
    return Sample(sum(length for _, length in (*chunks, *blocks)), seed, tuple(different))


class _Checker:
    """Reads the sample and compares it."""

    def __init__(self, source: PointInTimeSource, repository: Repository, parent: Index,
                 given_up: threading.Event) -> None:
        self._source, self._repository, self._parent = source, repository, parent
        self._fetcher = repository.chunk_reader()
        self._given_up = given_up

    def compare_chunks(self, reader: SourceReader, chunks: Sequence[Extent]) -> list[Extent]:
        """Whole chunks, by name."""
        chunk_size = self._parent.chunk_size
        longest = max(1, WINDOW // chunk_size)
        different: list[Extent] = []
        with IoBuffer(longest * chunk_size) as room:
            for start in range(0, len(chunks), longest):
                if self._given_up.is_set():
                    break
                portion = chunks[start : start + longest]
                reader.read_into(portion, room.view)
                position = 0
                for offset, length in portion:
                    if not self._is_same(room.view[position : position + length], offset // chunk_size):
                        different.append((offset, length))
                    position += length
        return different

    def _is_same(self, data: memoryview, number: int) -> bool:
        """Whether the parent has this content there. Raises DamagedError if it should, and the chunk is gone."""
        from stasis.backup.repo.objects import Kind, object_name

        repository, name = self._repository, self._parent.name(number)
        if repository.chunk_name(data) != self._fetcher.content_name(name, len(data)):
            return False
        if repository.store.cheap_lookup and not repository.has_chunk(name):
            raise repository.codec().missing(object_name(Kind.CHUNK, name))
        return True

    def compare_blocks(self, reader: SourceReader, blocks: Sequence[Extent]) -> list[Extent]:
        """Parts of chunks, with the chunk that the parent has there."""
        different: list[Extent] = []
        if not blocks:
            return different
        chunk_size = self._parent.chunk_size
        with IoBuffer(chunk_size) as held, IoBuffer(max(length for _, length in blocks)) as room:
            for offset, length in blocks:
                if self._given_up.is_set():
                    break
                number, at = divmod(offset, chunk_size)
                self._fetcher.fetch(self._parent.name(number), held.view[: self._parent.chunk_length(number)])
                reader.read_into([(offset, length)], room.view)
                # bytes, because Python compares views element by element
                if bytes(room.view[:length]) != bytes(held.view[at : at + length]):
                    different.append((offset, length))
        return different


