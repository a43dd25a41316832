# SPDX-License-Identifier: Apache-2.0
"""A change map as its readers see it: what it says of itself, and which blocks changed since when."""

from __future__ import annotations

import mmap
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from stasis.block import mapformat as layout
from stasis.block.mapformat import Identity, MapInfo
from stasis.errors import GenerationError, StateError, UsageError


class MapView:
    """A mapped change map. Readers share it with its worker and see every mark at once."""

    def __init__(self, path: Path, fd: int, writable: bool) -> None:
        self.path, self.fd, self.writable = path, fd, writable
        if os.fstat(fd).st_size < layout.HEADER_SIZE:
            os.close(fd)
            raise StateError(f"{path} is cut short", hint="remove it; tracking starts a new generation")
        self._mmap = mmap.mmap(fd, 0, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        try:
            self.refresh()
        except StateError:
            self._mmap.close()
            os.close(fd)
            raise
        view = memoryview(self._mmap)
        start = layout.HEADER_SIZE + layout.padded(self.block_count)
        self.active: memoryview = view[layout.HEADER_SIZE : layout.HEADER_SIZE + self.block_count]
        self.held: memoryview = view[start : start + self.block_count]

    @classmethod
    def open_readonly(cls, path: Path) -> Self:
        """Open an existing map to look at it; it stays shared with its worker."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), writable=False)

    def _load(self) -> None:
        raw = self._mmap[: layout.HEADER.size]
        if len(raw) < layout.HEADER.size or raw[:8] != layout.MAGIC:
            raise StateError(f"{self.path} is no change map", hint="remove it; tracking starts a new generation")
        if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            raise StateError(f"{self.path} is damaged", hint="remove it; tracking starts a new generation")
        (
            _,
            version,
            self.block_shift,
            self.capacity,
            self.block_count,
            generation,
            held,
            self.number,
            self.previous,
            self.held_number,
            self._flags,
            self._boot,
            *identity,
            assumed,
            _,
        ) = layout.HEADER.unpack(raw)
        if version != layout.VERSION:
            raise StateError(f"{self.path} has version {version}", hint=f"this program reads version {layout.VERSION}")
        if len(self._mmap) < layout.HEADER_SIZE + 2 * layout.padded(self.block_count):
            raise StateError(f"{self.path} is cut short", hint="remove it; tracking starts a new generation")
        self._generation, self._held_generation = generation, held
        self.identity = Identity(*identity)
        self.assumed = assumed.rstrip(b"\0").decode(errors="replace")

    def refresh(self) -> None:
        """Read the header again, as a reader of a map that its worker changes. StateError if it stays damaged."""
        for _ in range(20):
            try:
                return self._load()
            except StateError:
                time.sleep(0.001)  # the worker was just storing it
        return self._load()

    def close(self) -> None:
        """Unmap and close; marks stay in the page cache."""
        self.active.release()
        self.held.release()
        try:
            self._mmap.close()
        except BufferError:
            pass  # a caller still holds a slice: the mapping goes with it
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- state ------------------------------------------------------------------------------------

    @property
    def generation(self) -> str:
        """UUID within which change numbers can be compared."""
        return str(uuid.UUID(bytes=self._generation))

    @property
    def held_generation(self) -> str:
        """Generation of the held map."""
        return str(uuid.UUID(bytes=self._held_generation))

    @property
    def change_number(self) -> int:
        """Number of the last snapshot of this generation; 0 before the first."""
        return int(self.previous)

    @property
    def is_held(self) -> bool:
        """Whether the held map belongs to a snapshot that exists."""
        return bool(self._flags & layout.FLAG_HELD)

    @property
    def is_clean(self) -> bool:
        """Whether the last worker ended in order."""
        return bool(self._flags & layout.FLAG_CLEAN)

    @property
    def is_broken(self) -> bool:
        """Whether changes may have been missed: nothing can be concluded from this map any more. Sticky."""
        return bool(self._flags & layout.FLAG_BROKEN)

    @property
    def fs_mark(self) -> bytes:
        """What the file system on the device said of itself at the last clean end (`Origin.fs_mark`)."""
        return self._mmap[layout.FS_MARK_OFFSET : layout.FS_MARK_OFFSET + layout.FS_MARK_SIZE]

    @property
    def same_boot(self) -> bool:
        """Whether the map was last used since the machine started, so that its page cache is intact."""
        return bool(self._boot == layout.this_boot())

    def info(self) -> MapInfo:
        """Everything but the bytes."""
        held = self.is_held
        return MapInfo(
            1 << self.block_shift,
            self.block_count,
            self.capacity,
            self.generation,
            self.change_number,
            self.held_generation if held else None,
            self.held_number if held else None,
            self.is_clean,
            self.is_broken,
            self.assumed,
        )

    @property
    def last_tick(self) -> int:
        """Time of the last `tick`, nanoseconds since 1970."""
        return int(layout.ALIVE.unpack_from(self._mmap, layout.ALIVE_OFFSET)[0])

    def blocks(self, offset: int, length: int) -> range:
        """Tracking blocks that a range of bytes touches."""
        return range(offset >> self.block_shift, -(-(offset + length) >> self.block_shift))

    # -- reading ----------------------------------------------------------------------------------

    def changed_extents(
        self,
        since: int,
        *,
        held: bool = False,
        generation: str | None = None,
    ) -> list[tuple[int, int]]:
        """Byte ranges changed after snapshot `since`: (offset, length), ascending and merged.

        `held` asks for the map held with the snapshot. GenerationError if `since` belongs to another
        generation or lies ahead of it.
        """
        self.check_since(since, held=held, generation=generation)
        return list(self.iter_changed(since, held=held))

    def check_since(self, since: int, *, held: bool = False, generation: str | None = None) -> int:
        """Number of the last snapshot that `since` may be compared with, or GenerationError."""
        self.refresh()
        if self.is_broken:
            raise GenerationError(f"nothing is known of the changes: {self.assumed}", hint="make a full copy")
        if held and not self.is_held:
            raise UsageError(f"no snapshot holds {self.path.parent.name}'s map", hint="leave out --held")
        current, last = (self.held_generation, self.held_number) if held else (self.generation, self.previous)
        if generation is not None and generation != current:
            raise GenerationError(f"the map's generation is {current}, not {generation}", hint="make a full copy")
        if not 0 <= since <= last:
            raise GenerationError(
                f"change number {since} is not of this generation, whose last is {last}", hint="make a full copy"
            )
        return int(last)

    def iter_changed(self, since: int, *, held: bool = False, start: int = 0) -> Iterator[tuple[int, int]]:
        """Changed byte ranges from byte `start` on, without checks."""
        bits = bytes(self.held if held else self.active).translate(layout.above(since))
        position, shift = start >> self.block_shift, self.block_shift
        while (first := bits.find(b"\1", position)) >= 0:
            stop = bits.find(b"\0", first)
            position = len(bits) if stop < 0 else stop
            yield first << shift, min(position << shift, self.capacity) - (first << shift)
