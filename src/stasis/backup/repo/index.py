# SPDX-License-Identifier: Apache-2.0
"""The index of a backup: the name of the chunk at every place of the device, in segments of 4096 names.

Segments are content-addressed objects like chunks. A later backup shares those in which nothing changed, so that an
incremental backup writes as much index as it has changes, and memory holds a few segments whatever the size.

Behind its names a segment has the chain of each delta among them, in their order: the names of the deltas that it is
laid over, and of what those are laid over. What a backup needs can be told from its segments alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

from stasis.backup.repo.delta import DELTA_BIT, is_delta

__all__ = ["NAMES_PER_SEGMENT", "NAME_BYTES", "ZERO", "Index", "IndexBuilder", "is_whole"]

NAME_BYTES = 32
NAMES_PER_SEGMENT = 4096
ZERO = bytes(NAME_BYTES)
SEGMENT_BYTES = NAME_BYTES * NAMES_PER_SEGMENT
CACHED_SEGMENTS = 32
UNKNOWN_SIZE = 1 << 62

Load = Callable[[bytes, int], bytes]  # name of a segment, and how long its names are; its content
Save = Callable[[bytes], bytes]  # the content; the name of the segment
Chain = tuple[bytes, ...]
"""Names of what a delta is laid over: deltas, the newest first, then a chunk that is stored whole or ZERO."""


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
        self._chains: tuple[int, Mapping[int, Chain]] = -1, {}

    def name(self, number: int) -> bytes:
        """Name of the chunk `number`; ZERO where it holds nothing but zeroes."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        segment, place = divmod(number, NAMES_PER_SEGMENT)
        start = place * NAME_BYTES
        return self._content(segment)[start : start + NAME_BYTES]

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

    def needed(self) -> Iterator[bytes]:
        """Names of all that the chunks are made of, chains of deltas included."""
        for number in range(len(self._segments)):
            yield from _split(self._content(number))

    def segment(self, number: int) -> bytes:
        """All names of a segment, one behind the other."""
        return self._content(number)[: segment_length(self.count, number)]

    def chains(self, number: int) -> Mapping[int, Chain]:
        """What each delta in a segment is laid over, by the place of its name."""
        if (last := self._chains)[0] != number:
            length = segment_length(self.count, number)
            content = self._content(number)
            last = self._chains = number, dict(zip(_deltas(content[:length]), _chains(content[length:]), strict=True))
        return last[1]

    def chain(self, number: int) -> Chain:
        """What the chunk `number` is laid over, which is a delta."""
        segment, place = divmod(number, NAMES_PER_SEGMENT)
        return self.chains(segment)[place]

    def _content(self, number: int) -> bytes:
        name = self._segments[number]
        length = segment_length(self.count, number)
        if name == ZERO:
            return bytes(length)
        key = name
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        content = self._load(name, length)
        with self._lock:
            self._cache[key] = content
            while len(self._cache) > CACHED_SEGMENTS:
                self._cache.popitem(last=False)
        return content


class IndexBuilder:
    """Makes an index. What is not set is as in the parent, or ZERO without one. May be used from any thread."""

    def __init__(self, size: int | None, chunk_size: int, parent: Index | None, save: Save) -> None:
        """`size` is None where only the end of the source tells it; `finish` is given it then."""
        self.size = UNKNOWN_SIZE if size is None else size
        self.count = -(-self.size // chunk_size)
        self._chunk_size = chunk_size
        self._parent = parent if parent is not None and parent.chunk_size == chunk_size else None
        self._save = save
        self._open: dict[int, _OpenSegment] = {}
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

    def set(self, number: int, name: bytes, chain: Chain = ()) -> None:
        """Put a chunk in its place; `chain` is given with a delta. Raises ValueError when its segment is settled."""
        if not 0 <= number < self.count or len(name) != NAME_BYTES:
            raise IndexError(number)
        if [is_delta(one) for one in (name, *chain)] != [True] * len(chain) + [False]:
            raise ValueError("a chain belongs to a delta, and ends where it needs nothing more")
        segment, place = divmod(number, NAMES_PER_SEGMENT)
        with self._lock:
            if segment in self._done:
                raise ValueError(f"segment {segment} is settled already")
            if segment not in self._open:
                self._open[segment] = self._inherited(segment)
            if number == self._misfit:
                self._misfit = None
            self._open[segment].set(place, name, chain)

    def name(self, number: int) -> bytes:
        """What stands in a place now: what was set, or as in the parent. ValueError when its segment is settled."""
        segment, place = divmod(number, NAMES_PER_SEGMENT)
        with self._lock:
            if segment in self._done:
                raise ValueError(f"segment {segment} is settled already")
            if segment not in self._open:
                self._open[segment] = self._inherited(segment)
            return bytes(self._open[segment].names[place * NAME_BYTES : (place + 1) * NAME_BYTES])

    def settled(self, below: int) -> None:
        """No chunk with a number below this is set any more: what is complete is written and forgotten."""
        with self._lock:
            ready = sorted(n for n in self._open if min((n + 1) * NAMES_PER_SEGMENT, self.count) <= below)
            taken = [(number, self._open.pop(number)) for number in ready]
            self._done.update(dict.fromkeys(ready, ZERO))  # refuses later sets; replaced below
        for number, segment in taken:
            self._done[number] = self._saved(segment)

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
            for number, segment in self._open.items():
                del segment.names[segment_length(self.count, number) :]

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

    def _inherited(self, number: int) -> _OpenSegment:
        segment = _OpenSegment(bytearray(segment_length(self.count, number)))
        if self._parent is not None and number < len(self._parent.segment_names()):
            old = self._parent.segment(number)[: len(segment.names)]
            segment.names[: len(old)] = old
            segment.chains.update(self._parent.chains(number))
        return segment

    def _saved(self, segment: _OpenSegment) -> bytes:
        return self._save(segment.content()) if any(segment.names) else ZERO


class _OpenSegment:
    """A segment that is being filled."""

    def __init__(self, names: bytearray) -> None:
        self.names = names
        self.chains: dict[int, Chain] = {}

    def set(self, place: int, name: bytes, chain: Chain) -> None:
        self.names[place * NAME_BYTES : (place + 1) * NAME_BYTES] = name
        if chain:
            self.chains[place] = chain

    def content(self) -> bytes:
        return b"".join((self.names, *(name for place in _deltas(self.names) for name in self.chains[place])))


def is_whole(content: bytes, length: int) -> bool:
    """Whether this is the content of a segment whose names take `length` bytes."""
    rest = content[length:]
    ends = sum(byte < DELTA_BIT for byte in rest[NAME_BYTES - 1 :: NAME_BYTES])
    ended = not rest or rest[-1] < DELTA_BIT
    return (len(content) >= length and len(rest) % NAME_BYTES == 0 and ended
            and ends == sum(1 for _ in _deltas(content[:length])))


def _deltas(names: bytes | bytearray) -> Iterator[int]:
    """Places of the names of deltas."""
    last_bytes = names[NAME_BYTES - 1 :: NAME_BYTES]
    if last_bytes and max(last_bytes) >= DELTA_BIT:
        yield from (place for place, byte in enumerate(last_bytes) if byte >= DELTA_BIT)


def _chains(names: bytes) -> Iterator[Chain]:
    chain: list[bytes] = []
    for name in _split(names):
        chain.append(name)
        if not is_delta(name):
            yield tuple(chain)
            chain = []


def _split(names: bytes) -> Iterator[bytes]:
    return (names[start : start + NAME_BYTES] for start in range(0, len(names), NAME_BYTES))


def segment_length(count: int, number: int) -> int:
    """Bytes of a segment of an index of `count` names."""
    return NAME_BYTES * min(NAMES_PER_SEGMENT, count - number * NAMES_PER_SEGMENT)
