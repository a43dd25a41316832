# SPDX-License-Identifier: Apache-2.0
"""Where a COW file on the protected device lies there, and whether these blocks may be written under its file system.

The rules are those of swap files (mm/swapfile.c, iomap_swapfile_activate() in fs/iomap/swapfile.c): no holes, nothing
shared, nothing that the file system keeps elsewhere or in another form. Whoever breaks one of them could overwrite what
belongs to somebody else; docs/design/datto-on-device.md has the proof that nobody can.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from errno import EINVAL, EOPNOTSUPP
from itertools import pairwise

from stasis.errors import StateError, UnsupportedError
from stasis.linux import fiemap
from stasis.linux.fiemap import FileExtent

__all__ = ["NOTHING", "BlockMap", "Piece", "Range", "Territory", "check_extents", "probes"]

SECTOR = 512
PROBE_SIZE = 4096
PROBE_STEP = 16 << 20
"""One probe per so many bytes of an extent, besides those at both of its ends."""

Piece = tuple[int, int, int]
"""Bytes: place on the device, place within what was asked for, length."""

Range = tuple[int, int]
"""Bytes of the device: first, and the one behind the last."""

FIEMAP_EXTENT_MERGED = 0x1000
HARMLESS = fiemap.FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED

WRONG = {
    fiemap.FIEMAP_EXTENT_UNKNOWN: "has blocks whose place is not known",
    fiemap.FIEMAP_EXTENT_DELALLOC: "has blocks that have no place yet",
    fiemap.FIEMAP_EXTENT_ENCODED: "is compressed or encoded",
    fiemap.FIEMAP_EXTENT_DATA_ENCRYPTED: "is encrypted",
    fiemap.FIEMAP_EXTENT_NOT_ALIGNED: "does not begin at a block of its own",
    fiemap.FIEMAP_EXTENT_DATA_INLINE: "lies inside the file system's own blocks",
    fiemap.FIEMAP_EXTENT_DATA_TAIL: "shares a block with another file",
    fiemap.FIEMAP_EXTENT_UNWRITTEN: "has blocks that were never written",
    fiemap.FIEMAP_EXTENT_SHARED: "shares blocks with another file",
}


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Stretches of a file on its device: (place in the file, place on the device, length) in bytes, without a gap."""

    stretches: tuple[tuple[int, int, int], ...]
    _starts: list[int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [logical for logical, _, _ in self.stretches])

    @property
    def length(self) -> int:
        """Bytes of the file that have a place."""
        logical, _, length = self.stretches[-1] if self.stretches else (0, 0, 0)
        return logical + length

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Where `length` bytes of the file at `offset` lie, in the file's order. OSError if some have no place."""
        number = bisect_right(self._starts, offset) - 1
        position = 0
        while position < length:
            logical, physical, count = self.stretches[number] if 0 <= number < len(self.stretches) else (0, 0, 0)
            within = offset + position - logical
            step = min(count - within, length - position)
            if step <= 0:
                raise OSError(EINVAL, f"byte {offset + position} of the COW file has no place on the device")
            yield physical + within, position, step
            position, number = position + step, number + 1

    def place(self, offset: int, length: int) -> int:
        """Where `length` bytes at `offset` lie, if they do so in one piece; else -1. Hot: half the cost of `pieces`."""
        number = bisect_right(self._starts, offset) - 1
        if number < 0:
            return -1
        logical, physical, count = self.stretches[number]
        return physical + offset - logical if offset - logical + length <= count else -1

    def cut(self, length: int) -> BlockMap:
        """The same for the first `length` bytes."""
        return BlockMap(tuple((logical, physical, min(count, length - logical))
                              for logical, physical, count in self.stretches if logical < length))

    def ranges(self) -> list[Range]:
        """(start, end) in bytes of the device, ascending, neighbours joined."""
        found: list[Range] = []
        for _, physical, count in sorted(self.stretches, key=lambda stretch: stretch[1]):
            if found and found[-1][1] == physical:
                found[-1] = (found[-1][0], physical + count)
            else:
                found.append((physical, physical + count))
        return found


class Territory:
    """Ranges of the device that belong to a COW file: ascending, apart from each other."""

    def __init__(self, ranges: Sequence[Range], block_size: int) -> None:
        self.ranges = tuple(ranges)
        self._starts = [start for start, _ in self.ranges]
        self.is_rough = any((start | end) % block_size for start, end in self.ranges)
        """Whether a block of `block_size` bytes may belong to the file in part."""

    def inside(self, start: int, end: int) -> Iterator[Range]:
        """The parts of a range that belong to the file."""
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self.ranges) if start < end else 0):
            low, high = self.ranges[number]
            if low >= end:
                return
            if high > start:
                yield max(low, start), min(high, end)

    def outside(self, start: int, end: int) -> Iterator[Range]:
        """The parts of a range that do not."""
        for low, high in self.inside(start, end):
            if low > start:
                yield start, low
            start = high
        if start < end:
            yield start, end

    def as_numbers(self, most: int) -> list[int]:
        """Offset and length of each range by turns; with more than `most` numbers, one range that holds them all."""
        flat = [number for start, end in self.ranges for number in (start, end - start)]
        return flat if len(flat) <= most else [flat[0], flat[-2] + flat[-1] - flat[0]]

    def touches(self, start: int, end: int) -> bool:
        """Whether a range has a byte of the file."""
        return next(self.inside(start, end), None) is not None


NOTHING = Territory((), SECTOR)


def check_extents(found: Iterable[FileExtent], size: int, device: int, path: str, *, allowed: int = 0
                  ) -> BlockMap:
    """The map of a file of `size` bytes on a device of `device` bytes.

    `allowed`: FIEMAP flags that are no reason to refuse. Raises StateError (EINVAL) or
    UnsupportedError (EOPNOTSUPP) for what could not be written safely.
    """
    extents = sorted(found, key=lambda extent: extent.logical)
    for extent in extents:
        _check_flags(extent, HARMLESS | allowed, path)
        if extent.physical <= 0 or extent.length <= 0 or extent.physical + extent.length > device:
            raise _refused(path, f"lies at byte {extent.physical}, which is not inside the device")
        if (extent.logical | extent.physical | extent.length) % SECTOR:
            raise _refused(path, "does not lie on whole sectors")
    blocks = BlockMap(_joined(extents, path))
    if blocks.length < size:
        raise _refused(path, f"has a hole at byte {blocks.length}")
    if any(end > start for (_, end), (start, _) in pairwise(_by_place(blocks.stretches))):
        raise _refused(path, "has a block twice")
    return blocks


def _check_flags(extent: FileExtent, allowed: int, path: str) -> None:
    wrong = extent.flags & ~allowed
    if not wrong:
        return
    reason = next((text for flag, text in WRONG.items() if wrong & flag), f"has extents of a new kind ({wrong:#x})")
    raise UnsupportedError(f"{path} {reason}: its blocks cannot be written under the file system", errno=EOPNOTSUPP,
                           hint="name a file on another disk")


def _joined(extents: Sequence[FileExtent], path: str) -> tuple[tuple[int, int, int], ...]:
    """Stretches without a gap; neighbours on the device become one."""
    joined: list[tuple[int, int, int]] = []
    end = 0
    for extent in extents:
        if extent.logical != end:
            raise _refused(path, f"has {'a hole' if extent.logical > end else 'two places'} at byte {end}")
        end += extent.length
        if joined and joined[-1][1] + joined[-1][2] == extent.physical:
            logical, physical, length = joined[-1]
            joined[-1] = logical, physical, length + extent.length
        else:
            joined.append((extent.logical, extent.physical, extent.length))
    return tuple(joined)


def _by_place(stretches: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return sorted((physical, physical + length) for _, physical, length in stretches)


def _refused(path: str, reason: str) -> StateError:
    return StateError(f"{path} {reason}: its blocks cannot be written under the file system", errno=EINVAL,
                      hint="name a file on another disk")


def probes(blocks: BlockMap, size: int) -> list[tuple[int, int]]:
    """(offset in the file, length) of the places where a map is tried: both ends of every stretch, and in between."""
    found: set[tuple[int, int]] = set()
    for logical, _, count in blocks.stretches:
        end = min(logical + count, size)
        starts = [*range(logical, end, PROBE_STEP), max(logical, end - PROBE_SIZE)]
        found.update((start, min(PROBE_SIZE, end - start)) for start in starts if start < end)
    return sorted(found)
