# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a device changed since which snapshot: one byte per tracking block.

Each byte holds the number of the epoch in which the block was last written; a block changed since
snapshot N when its byte is greater than N. The map lives in a file-backed shared mapping, so the death
of its worker loses nothing; a power cut is covered together with the write-intent log. The layout is in
docs/formats/change-map.md, the argument why no change is missed in docs/design/change-maps.md.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from stasis.block import mapformat as layout
from stasis.block.mapformat import Identity, MapInfo, SwitchResult
from stasis.block.mapview import MapView


class ChangeMap(MapView):
    """A change map in the hands of its worker, its one writer."""

    def __init__(self, path: Path, fd: int, writable: bool) -> None:
        super().__init__(path, fd, writable)
        self._undo: tuple[Any, ...] | None = None
        self._undo_held = b""
        self._must_clear = False

    # -- files ------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, size: int, shift: int, reason: str = "") -> ChangeMap:
        """Make a new map with a new generation in place of whatever `path` held, durably."""
        count = max(1, -(-size >> shift))
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Allocated in full: a store into a hole of a mapping on a full disk would be a SIGBUS.
            os.posix_fallocate(fd, 0, layout.HEADER_SIZE + 2 * layout.padded(count))
            fields = (
                layout.MAGIC,
                layout.VERSION,
                shift,
                size,
                count,
                uuid.uuid4().bytes,
                bytes(16),
                1,
                0,
                0,
                layout.FLAG_CLEAN,
                layout.this_boot(),
                0,
                0,
                0,
                -1,
                reason.encode()[:200],
            )
            os.pwrite(fd, layout.sealed(fields), 0)
            os.fsync(fd)
            os.replace(temporary, path)
            layout.sync_directory(path.parent)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, writable=True)

    @classmethod
    def open(cls, path: Path) -> ChangeMap:
        """Open an existing map for its worker. FileNotFoundError, or StateError if it is damaged."""
        return cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC), writable=True)

    def _store_header(self) -> None:
        who = self.identity
        self._mmap[: layout.HEADER.size] = layout.sealed(
            (
                layout.MAGIC,
                layout.VERSION,
                self.block_shift,
                self.capacity,
                self.block_count,
                self._generation,
                self._held_generation,
                self.number,
                self.previous,
                self.held_number,
                self._flags,
                self._boot,
                who.device,
                who.inode,
                who.size,
                who.mark,
                self.assumed.encode()[:200],
            )
        )

    def sync(self) -> None:
        """Make the map as it stands durable. Slow; may run in another thread than the marks."""
        os.fdatasync(self.fd)

    # -- state ------------------------------------------------------------------------------------

    def set_broken(self, reason: str) -> None:
        """Marks can no longer be kept safe. Said in the header, as durably as the disk still allows."""
        self._flags |= layout.FLAG_BROKEN
        self.assumed = f"tracking is broken: {reason}"
        self._store_header()
        with contextlib.suppress(OSError):
            self.sync()

    def begin(self, assumed: str, identity: Identity) -> None:
        """Take the map into use: from here on it is unclean until `finish`. Durable."""
        self._flags &= ~layout.FLAG_CLEAN
        self.identity = identity
        self._boot, self.assumed = layout.this_boot(), assumed
        self._store_fs_mark(layout.NO_FS_MARK)
        self._store_header()
        self.tick()
        self.sync()

    def finish(self, identity: Identity, fs_mark: bytes = layout.NO_FS_MARK) -> None:
        """End in order: everything durable, then the clean flag, then that durable."""
        self._store_fs_mark(fs_mark)
        self.sync()
        self._flags |= layout.FLAG_CLEAN
        self.identity = identity
        self._store_header()
        self.sync()

    def _store_fs_mark(self, mark: bytes) -> None:
        self._mmap[layout.FS_MARK_OFFSET : layout.FS_MARK_OFFSET + layout.FS_MARK_SIZE] = mark

    def tick(self) -> None:
        """Note the time, so that a later start can tell whether others wrote to an image file since."""
        layout.ALIVE.pack_into(self._mmap, layout.ALIVE_OFFSET, time.time_ns())

    # -- marks ------------------------------------------------------------------------------------

    def is_marked(self, offset: int, length: int) -> bool:
        """Whether all blocks of a range already carry the active number."""
        blocks = self.blocks(offset, length)
        number = self.number
        return bytes(self.active[blocks.start : blocks.stop]).count(number) == len(blocks)

    def mark(self, offset: int, length: int) -> None:
        """Mark a range as changed in the current epoch."""
        blocks = self.blocks(offset, length)
        if len(blocks) == 1:
            self.active[blocks.start] = self.number
        else:
            self.active[blocks.start : blocks.stop] = bytes((self.number,)) * len(blocks)

    def mark_held(self, offset: int, length: int) -> None:
        """Mark a range in the held map too, as changed in the epoch that the snapshot ended."""
        blocks = self.blocks(offset, length)
        self.held[blocks.start : blocks.stop] = bytes((self.held_number,)) * len(blocks)

    # -- epochs -----------------------------------------------------------------------------------

    def prepare_switch(self) -> None:
        """Do ahead of `switch` what takes time and can fail: keep the held map for `undo_switch`."""
        self._undo_held = bytes(self.held)

    def switch(self) -> SwitchResult:
        """End the epoch: the active map becomes the held one and the change number is raised.

        At 255 a new generation begins with number 1 over an empty map. The empty map must not reach the disk
        before the new generation does, or a power cut would leave the old generation without its changes; so
        the bytes are only told apart here (1 becomes 2) and cleared by `clear_wrapped` after a `sync`.
        """
        self._undo = (
            self._generation,
            self._held_generation,
            self.number,
            self.previous,
            self.held_number,
            self._flags,
        )
        self.held[:] = self.active
        self._held_generation, self.held_number = self._generation, self.number
        ended, wrapped = self.number, self.number == layout.HIGHEST_NUMBER
        if wrapped:
            self.active[:] = bytes(self.active).replace(b"\1", b"\2")
            self._generation, self.number, self.previous = uuid.uuid4().bytes, 1, 0
        else:
            self.number, self.previous = ended + 1, ended
        # Marks of the epochs after the first must not be cleared with what the old generation left.
        self._must_clear = wrapped
        self._flags |= layout.FLAG_HELD
        self._store_header()
        return SwitchResult(self.held_generation, ended, wrapped)

    def clear_wrapped(self) -> bool:
        """After a wrap is durable: clear what the old generation left. Tells whether there was anything."""
        if not self._must_clear:
            return False
        self.active[:] = bytes(self.active).translate(layout.ONLY_ONE)
        self._must_clear = False
        return True

    def undo_switch(self) -> None:
        """Take back the last `switch`; only before anything was written in the new epoch."""
        if self._undo is None:
            return
        if self._must_clear:
            self.active[:] = self.held
            self._must_clear = False
        self.held[:] = self._undo_held
        (self._generation, self._held_generation, self.number, self.previous, self.held_number, self._flags) = (
            self._undo
        )
        self._store_header()
        self.forget_undo()

    def forget_undo(self) -> None:
        """The last switch stands."""
        self._undo, self._undo_held = None, b""

    def release_held(self) -> None:
        """The snapshot that the held map belongs to is gone."""
        self._flags &= ~layout.FLAG_HELD
        self._store_header()


__all__ = ["ChangeMap", "Identity", "MapInfo", "SwitchResult"]
