# SPDX-License-Identifier: Apache-2.0
"""What a backup holds, or what differs from an earlier one, as extents that ascend: what goes into streams and files.

All of a backup is told in chunks, and zeroes are left out; differences are told in blocks of 4 KiB, zeroes too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from stasis.backup.progress import Progress
from stasis.backup.repo import ZERO, Index, Manifest, Repository
from stasis.backup.serve.cache import ChunkCache, Key
from stasis.backup.serve.diff import Difference, diff
from stasis.backup.serve.opening import open_cache
from stasis.backup.streams.rbddiff import Piece
from stasis.errors import UsageError

__all__ = ["Extents"]

CACHE_BYTES = 32 << 20


class Extents:
    """The extents of a backup, seen from `base`. To be read under a lock of the repository.

    Raises UsageError when `base` is of another device, and DamagedError while it reads.
    """

    def __init__(self, repository: Repository, backup: Manifest, base: Manifest | None) -> None:
        if base is not None and (base.host, base.device) != (backup.host, backup.device):
            raise UsageError(f"backup {base.id[:12]} is of {base.device} on {base.host}, not of {backup.device} on "
                             f"{backup.host}", hint="name an earlier backup of the same device")
        self._repository = repository
        self._index = repository.index(backup)
        self._base = repository.index(base) if base else None
        self._buffer = memoryview(bytearray(backup.chunk_size))
        self.bytes_data = 0
        self.bytes_zero = 0

    def read(self, progress: Progress, phase: str) -> Iterator[Piece]:
        """Extents within one chunk each, or zeroes of any length; data is valid until the next one is asked for."""
        progress.phase(phase, self._index.size)
        done = 0
        with open_cache(self._repository, CACHE_BYTES) as cache:
            for extent in self._ahead(cache):
                yield self._piece(cache, extent)
                progress.add(extent.offset + extent.length - done)
                done = extent.offset + extent.length
        progress.add(self._index.size - done)

    def _differences(self, cache: ChunkCache) -> Iterator[Difference]:
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
            if len(waiting) > cache.window // 2:
                yield waiting.popleft()
        yield from waiting

    def _piece(self, cache: ChunkCache, extent: Difference) -> Piece:
        key = self._key(extent)
        if key is None:
            self.bytes_zero += extent.length
            return extent.offset, extent.length, None
        cache.copy([(key, extent.offset % self._index.chunk_size, extent.length, 0)], self._buffer)
        self.bytes_data += extent.length
        return extent.offset, extent.length, self._buffer[: extent.length]

    def _key(self, extent: Difference) -> Key | None:
        """The chunk that the extent lies in; None for zeroes."""
        number = extent.offset // self._index.chunk_size
        if extent.zero or (name := self._index.name(number)) == ZERO:
            return None
        return name, self._index.chunk_length(number)


def _no_segments(name: bytes, length: int) -> bytes:
    raise IndexError(name)
