# SPDX-License-Identifier: Apache-2.0
"""A backup as an NBD export: read from its chunks, with what it allocates and what differs from another backup."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EIO
from typing import ParamSpec, TypeVar

from stasis.backup.repo.index import NAMES_PER_SEGMENT, ZERO
from stasis.backup.serve.cache import ChunkCache, Ended, Key, Piece
from stasis.backup.serve.changes import Change, Index, differences
from stasis.backup.serve.readahead import ReadAhead
from stasis.block.exports import BASE_ALLOCATION, DIRTY_BITMAP, NBD_STATE_HOLE, NBD_STATE_ZERO, Status
from stasis.errors import StasisError
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.export import Export, Request

__all__ = ["BackupExport"]

log = logging.getLogger(__name__)

STATUS_CHUNKS = 2 * NAMES_PER_SEGMENT
"""Chunks that one block status answer looks at: two segments of the index. The client asks on from where it ends."""
_LOGGED = 1000
"""Different failures that are logged; a client that reads a damaged place again and again does not fill the log."""
_ZEROES = memoryview(bytes(1 << 20))

P = ParamSpec("P")
T = TypeVar("T")


class BackupExport(Export):
    """A backup, read-only. `against` is (id, index) of the backup that the dirty bitmap compares with."""

    read_only = True
    can_multi_conn = True
    can_cache = True
    reports_holes = True

    def __init__(
        self,
        name: str,
        index: Index,
        cache: ChunkCache,
        *,
        description: str = "",
        against: tuple[str, Index] | None = None,
    ) -> None:
        self.name, self.description, self.size = name, description, index.size
        self._index, self._cache = index, cache
        self._chunk_size = index.chunk_size
        self._bitmap = against[0] if against else ""
        self._against = against[1] if against else None
        self._ahead = ReadAhead(max(1, cache.window // 2))
        self._logged: set[str] = set()

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        self.read_into(buffer.view, requests)

    def read_into(self, view: memoryview, requests: Sequence[Request]) -> None:
        """As `read`, for any memory. OSError(EIO) for what is damaged or cannot be had, once it is logged."""
        self._guarded(self._read, view, requests)

    def _read(self, view: memoryview, requests: Sequence[Request]) -> None:
        pieces: list[Piece] = []
        ahead: dict[int, None] = {}
        name_of, touch, size = self._index.name, self._ahead.touch, self._chunk_size
        for offset, length, position in requests:
            end = offset + length
            while offset < end:
                number, start = divmod(offset, size)
                count = min(size - start, end - offset)
                name = name_of(number)
                ahead.update(dict.fromkeys(touch(number)))
                if name == ZERO:
                    _clear(view, position, count)
                else:
                    pieces.append((self._key(number, name), start, count, position))
                offset += count
                position += count
        self._prefetch(ahead)
        self._cache.copy(pieces, view)

    def _key(self, number: int, name: bytes) -> Key:
        return name, min(self._chunk_size, self.size - number * self._chunk_size)

    def _prefetch(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number >= self._index.count:
                return
            name = self._index.name(number)
            if name != ZERO and not self._cache.prefetch(self._key(number, name)):
                return

    def cache(self, offset: int, length: int) -> None:
        first = offset // self._chunk_size
        stop = -(-(offset + length) // self._chunk_size)
        self._guarded(self._prefetch, range(first, min(stop, first + self._cache.window)))

    # -- status -------------------------------------------------------------------------------------

    def contexts(self) -> Sequence[str]:
        return (BASE_ALLOCATION, *([DIRTY_BITMAP + self._bitmap] if self._against is not None else []))

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        return self._guarded(self._status, context, offset, length)

    def _status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        first = offset // self._chunk_size
        stop = min(-(-(offset + length) // self._chunk_size), first + STATUS_CHUNKS)
        status = Status(offset, length)
        for end, flags in self._dirty(first, stop) if context != BASE_ALLOCATION else self._allocated(first, stop):
            if not status.add(end * self._chunk_size, flags):
                break
        return status.extents

    def _allocated(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(chunk behind it, flags) of consecutive stretches."""
        for number, name in enumerate(self._index.names(first, stop - first), first + 1):
            yield number, NBD_STATE_HOLE | NBD_STATE_ZERO if name == ZERO else 0

    def _dirty(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        assert self._against is not None  # no other context is on offer without it
        for start, count, change in differences(self._against, self._index, first, stop):
            yield start + count, int(change is not Change.NONE)

    def _guarded(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Whatever fails becomes EIO for the client; the log says which object it was."""
        try:
            return function(*args, **kwargs)
        except Ended:
            raise
        except (OSError, StasisError) as error:
            text = str(error)
            if text not in self._logged and len(self._logged) < _LOGGED:
                self._logged.add(text)
                log.error("backup %s: %s", self.name, text)
            raise OSError(EIO, text) from error


def _clear(view: memoryview, position: int, count: int) -> None:
    for start in range(position, position + count, len(_ZEROES)):
        length = min(len(_ZEROES), position + count - start)
        view[start : start + length] = _ZEROES[:length]
