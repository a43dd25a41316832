# SPDX-License-Identifier: Apache-2.0
"""The index of a backup: the name of the chunk at every place of the device, in segments of 4096 names.

Segments are content-addressed objects like chunks. A later backup shares those in which nothing changed, so that an
incremental backup writes as much index as it has changes, and memory holds a few segments whatever the size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

__all__ = ["NAMES_PER_SEGMENT", "NAME_BYTES", "ZERO", "Index", "IndexBuilder"]

NAME_BYTES = 32
NAMES_PER_SEGMENT = 4096
ZERO = bytes(NAME_BYTES)
SEGMENT_BYTES = NAME_BYTES * NAMES_PER_SEGMENT
CACHED_SEGMENTS = 32
UNKNOWN_SIZE = 1 << 62

Load = Callable[[bytes, int], bytes]  # name and length of a segment; its names one behind the other
Save = Callable[[bytes], bytes]  # the names; the name of the segment


class Index:
    """Chunk names of one backup. May be used from any thread. Raises DamagedError when a segment is."""

    def __init__(self, size: int, chunk_size: int, segments: Sequence[bytes], load: Load) -> None:
        self.size = size
        self.chunk_size = chunk_size
        self.count = -(-size // chunk_size)
        self._segments = tuple(segments)
        self._load = load
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, number: int) -> bytes:
        """Name of the chunk `number`; ZERO where it holds nothing but zeroes."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        segment, place = divmod(number, NAMES_PER_SEGMENT)
        start = place * NAME_BYTES
        return self.segment(segment)[start : start + NAME_BYTES]

    def names(self, first: int = 0, count: int | None = None) -> Iterator[bytes]:
        """Names of `count` chunks from `first` on, to the end by default."""
        end = self.count if count is None else min(first + count, self.count)
        while first < end:
            number, place = divmod(first, NAMES_PER_SEGMENT)
            names = self.segment(number)
            stop = min(len(names), (place + end - first) * NAME_BYTES)
            for start in range(place * NAME_BYTES, stop, NAME_BYTES):
                yield names[start : start + NAME_BYTES]
            first = (number + 1) * NAMES_PER_SEGMENT

    def chunk_length(self, number: int) -> int:
        """Bytes in a chunk: the last one may be short."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def segment_names(self) -> Sequence[bytes]:
        """Names of the segments; ZERO for one that names nothing but ZERO."""
        return self._segments

    def segment(self, number: int) -> bytes:
        """All names of a segment, one behind the other."""
        name = self._segments[number]
        length = segment_length(self.count, number)
        if name == ZERO:
            return bytes(length)
        key = name
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        names = self._load(name, length)
        with self._lock:
            self._cache[key] = names
            while len(self._cache) > CACHED_SEGMENTS:
                self._cache.popitem(last=False)
        return names


class IndexBuilder:
    """Makes an index. What is not set is as in the parent, or ZERO without one. May be used from any thread."""

    def __init__(self, size: int | None, chunk_size: int, parent: Index | None, save: Save) -> None:
        """`size` is None where only the end of the source tells it; `finish` is given it then."""
        self.size = UNKNOWN_SIZE if size is None else size
        self.count = -(-self.size // chunk_size)
        self._chunk_size = chunk_size
        self._parent = parent if parent is not None and parent.chunk_size == chunk_size else None
        self._save = save
        self._open: dict[int, bytearray] = {}
        self._done: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._misfit = self._short_chunk()

    def _short_chunk(self) -> int | None:
        """The one chunk that cannot be the parent's because it has another length: the device grew or shrank."""
        if self._parent is None or not (shared := min(self._parent.count, self.count)):
            return None
        last = shared - 1
        length = min(self._chunk_size, self.size - last * self._chunk_size)
        same = self._parent.chunk_length(last) == length or self._parent.name(last) == ZERO
        return None if same else last

    def set(self, number: int, name: bytes) -> None:
        """Put a chunk in its place. Raises ValueError when its segment is settled."""
        if not 0 <= number < self.count or len(name) != NAME_BYTES:
            raise IndexError(number)
        segment, place = divmod(number, NAMES_PER_SEGMENT)
        with self._lock:
            if segment in self._done:
                raise ValueError(f"segment {segment} is settled already")
            if segment not in self._open:
                self._open[segment] = self._inherited(segment)
            if number == self._misfit:
                self._misfit = None
            self._open[segment][place * NAME_BYTES : (place + 1) * NAME_BYTES] = name

    def settled(self, below: int) -> None:
        """No chunk with a number below this is set any more: what is complete is written and forgotten."""
        with self._lock:
            ready = sorted(n for n in self._open if min((n + 1) * NAMES_PER_SEGMENT, self.count) <= below)
            taken = [(number, self._open.pop(number)) for number in ready]
            self._done.update(dict.fromkeys(ready, ZERO))  # refuses later sets; replaced below
        for number, names in taken:
            self._done[number] = self._saved(names)

    def finish(self, size: int | None = None) -> tuple[bytes, ...]:
        """Names of all segments, for the manifest. `size`: what it turned out to be; no chunk behind it was set."""
        if size is not None:
            self._cut(size)
        if self._misfit is not None and self._misfit < self.count:
            raise ValueError(f"chunk {self._misfit} has another length than in the parent, and was not set")
        self.settled(self.count)
        return tuple(self._finished(number) for number in range(-(-self.count // NAMES_PER_SEGMENT)))

    def _cut(self, size: int) -> None:
        self.size, self.count = size, -(-size // self._chunk_size)
        with self._lock:
            for number, names in self._open.items():
                del names[segment_length(self.count, number) :]

    def _finished(self, number: int) -> bytes:
        if number in self._done:
            return self._done[number]
        if self._parent is None:
            return ZERO
        names = self._parent.segment_names()
        if number >= len(names):
            return ZERO
        if segment_length(self._parent.count, number) == segment_length(self.count, number):
            return names[number]
        return self._saved(self._inherited(number))

    def _inherited(self, number: int) -> bytearray:
        names = bytearray(segment_length(self.count, number))
        if self._parent is not None and number < len(self._parent.segment_names()):
            old = self._parent.segment(number)[: len(names)]
            names[: len(old)] = old
        return names

    def _saved(self, names: bytearray) -> bytes:
        return self._save(bytes(names)) if any(names) else ZERO


def segment_length(count: int, number: int) -> int:
    """Bytes of a segment of an index of `count` names."""
    return NAME_BYTES * min(NAMES_PER_SEGMENT, count - number * NAMES_PER_SEGMENT)
