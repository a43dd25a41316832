# SPDX-License-Identifier: Apache-2.0
"""The index of a COW file: one entry per block of the device, of which a bounded part is in memory.

Entries are kept by sections of 4096. What is set goes to the file at once, into the kernel's page cache: so a section
leaves memory without being written, and the death of the process that writes loses no entry.
"""

from __future__ import annotations

import os
import sys
from array import array
from errno import EIO

from stasis.datto.layout import CHANGED, HEADER_AREA, SECTION_BLOCKS, SECTION_SHIFT, SECTION_SIZE, Geometry
from stasis.datto.scan import Run
from stasis.datto.waiting import pieces, places
from stasis.linux import files

__all__ = ["Index", "allowed_sections"]

MINIMUM_SECTIONS = 8
DESCRIPTOR_SIZE = 24
"""Bytes that dattobd takes per section for its description; they count against the cache there, and so here."""

DENSE = 8
"""With as many entries in a section it is cheaper to write all that lies between them, up to 32 KiB, in one."""
CROWDED = 256
"""With as many it is cheaper to take the whole section as one number than to look at each."""

_ONES = array("Q", [CHANGED]) * SECTION_BLOCKS
_LOW = 0 if sys.byteorder == "little" else 7
"""Which byte of an entry holds CHANGED."""
_MORE_THAN_CHANGED = int.from_bytes(array("Q", [~CHANGED & (1 << 64) - 1]) * SECTION_BLOCKS, "little")
"""All bits of a section that are not set in one without slots."""


def allowed_sections(cache: int, sections: int) -> int:
    """Sections that may be in memory at a time with a cache of so many bytes (dattobd's rule), but a few always."""
    return max(MINIMUM_SECTIONS, (cache - sections * DESCRIPTOR_SIZE) // SECTION_SIZE)


class Index:
    """The entries of one COW file, writer's side. `fresh`: the file holds no entry yet."""

    def __init__(self, fd: int, geometry: Geometry, cache: int, *, fresh: bool) -> None:
        self._fd, self._geometry = fd, geometry
        self.sections: dict[int, memoryview] = {}
        """Sections in memory; who looks entries up in a hot loop reads them here."""
        self._has_entries = bytearray(b"\0" if fresh else b"\1") * geometry.sections
        self.used: set[int] = set()
        """Sections that were used since memory last ran short."""
        self.set_cache(cache)

    def set_cache(self, cache: int) -> None:
        """Bound the memory from now on, in bytes."""
        self._allowed = allowed_sections(cache, self._geometry.sections)
        self._make_room(0)

    @property
    def is_bounded(self) -> bool:
        """Whether not all sections fit in memory, so that it matters which ones are used."""
        return self._allowed < self._geometry.sections

    @property
    def loaded(self) -> int:
        """Sections in memory now."""
        return len(self.sections)

    def section(self, number: int) -> memoryview:
        """The 4096 entries of a section. OSError if they cannot be read."""
        self.used.add(number)
        found = self.sections.get(number)
        return self._load(number) if found is None else found

    def _load(self, number: int) -> memoryview:
        self._make_room(1)
        data = bytearray(SECTION_SIZE)
        if self._has_entries[number]:
            self._read(memoryview(data), HEADER_AREA + number * SECTION_SIZE)
        view = self.sections[number] = memoryview(data).cast("Q")
        return view

    def _make_room(self, wanted: int) -> None:
        """Forget sections that were not used since this was last needed, and others if these are too few."""
        if len(self.sections) + wanted <= self._allowed:
            return
        keep = self._allowed // 2
        order = sorted(self.sections, key=self.used.__contains__)
        for number in order[: len(order) - keep]:
            del self.sections[number]
        self.used.clear()

    # -- entries ------------------------------------------------------------------------------------

    def entries(self, first: int, end: int) -> list[int]:
        """Entries of the blocks first to end."""
        values: list[int] = []
        for number, low, high in pieces(first, end):
            values += self.section(number)[low:high].tolist()
        return values

    def runs_without(self, first: int, end: int) -> list[Run]:
        """Runs of blocks that have no entry."""
        runs: list[Run] = []
        start = -1
        for block, entry in enumerate(self.entries(first, end), first):
            if not entry:
                start = block if start < 0 else start
            elif start >= 0:
                runs.append((start, block))
                start = -1
        return [*runs, (start, end)] if start >= 0 else runs

    def enter(self, block: int, value: int) -> int:
        """Give one block its entry; the one it had. Hot: half the cost of a first write beside its I/O."""
        number = block >> SECTION_SHIFT
        view = self.sections.get(number)
        if view is None:
            view = self.section(number)
        before: int = view[block & (SECTION_BLOCKS - 1)]
        view[block & (SECTION_BLOCKS - 1)] = value
        self._has_entries[number] = 1
        if os.pwrite(self._fd, value.to_bytes(8, sys.byteorder), HEADER_AREA + block * 8) != 8:
            raise OSError(EIO, "an entry of the COW file was written in part")
        return before

    def point(self, first: int, count: int, slot: int) -> None:
        """The old contents of `count` blocks lie in the file from `slot` on; readers see it on return."""
        if count == 1:
            self.enter(first, slot)
            return
        for number, low, high in pieces(first, first + count):
            self._set(number, low, array("Q", range(slot, slot + high - low)))
            slot += high - low

    def mark(self, first: int, end: int) -> int:
        """Give blocks the entry that says no more than changed. Returns how many had none."""
        if end - first == 1:
            return int(not self.enter(first, CHANGED))
        fresh = 0
        for number, low, high in pieces(first, end):
            fresh += self.section(number)[low:high].tolist().count(0)
            self._set(number, low, _ONES[: high - low])
        return fresh

    def mark_plane(self, number: int, plane: bytearray) -> int:
        """`mark` for the blocks of a section whose byte in `plane` is 1. Returns how many had no entry."""
        view = self.section(number)
        section = view.obj
        assert isinstance(section, bytearray)
        if plane.count(1) >= CROWDED and not int.from_bytes(section, "little") & _MORE_THAN_CHANGED:
            return self._merge(number, section, plane)
        todo = [place for place in places(plane) if view[place] != CHANGED]
        fresh = [view[place] for place in todo].count(0)
        for place in todo:
            view[place] = CHANGED
        step = len(todo) if len(todo) >= DENSE else 1  # what lies between is written as it is
        for first, last in zip(todo[::step], todo[step - 1 :: step], strict=True):
            self._write(view[first : last + 1].cast("B"), HEADER_AREA + number * SECTION_SIZE + first * 8)
        self._has_entries[number] |= bool(todo)
        return fresh

    def _merge(self, number: int, section: bytearray, plane: bytearray) -> int:
        # Hot: 10 µs for up to 4096 blocks, where one of them by itself takes 0.15.
        before = section[_LOW::8]
        after = int.from_bytes(before, "little") | int.from_bytes(plane, "little")
        section[_LOW::8] = after.to_bytes(SECTION_BLOCKS, "little")
        fresh = section.count(1) - before.count(1)
        if fresh:
            self._write(memoryview(section), HEADER_AREA + number * SECTION_SIZE)
            self._has_entries[number] = 1
        return fresh

    def _set(self, number: int, low: int, values: array[int]) -> None:
        view = memoryview(values)
        self.section(number)[low : low + len(values)] = view
        self._has_entries[number] = 1
        self._write(view.cast("B"), HEADER_AREA + number * SECTION_SIZE + low * 8)

    # -- the file -------------------------------------------------------------------------------------

    def _read(self, place: memoryview, offset: int) -> None:
        done = os.preadv(self._fd, [place], offset)
        if done < len(place):
            files.transfer_rest(os.preadv, self._fd, [place], offset, done)

    def _write(self, data: memoryview, offset: int) -> None:
        while len(data):
            done = os.pwrite(self._fd, data, offset)
            if not done:
                raise OSError(EIO, "the COW file takes no more")
            data, offset = data[done:], offset + done
