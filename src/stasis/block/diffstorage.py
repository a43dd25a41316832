# SPDX-License-Identifier: Apache-2.0
"""Difference storage: where the old contents of overwritten blocks go. One per snapshot, shared by its devices.

The backing is a file, an unnamed file in a directory, a block device, or memory. Space is handed out from
front to back and never reused. The allocator is a page shared by all workers under a lock that the kernel
gives back when its holder dies; each worker leases a stretch at a time, so the lock is seldom taken.

The contents need to outlive a worker, not a power cut (a snapshot ends with the boot), so writes are
buffered and a snapshot that is destroyed soon may never reach the disk. That a later writeback failed is
asked from the kernel before stored contents are trusted (`check`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ENOSPC, EOPNOTSUPP
from pathlib import Path
from typing import Any

from stasis.block.backing import (
    KIND_DEVICE,
    KIND_FILE,
    KIND_NAMES,
    KIND_UNNAMED,
    capacity_of,
    first_portion,
    open_backing,
    refuse_origins,
    remove,
    settle_limit,
)
from stasis.block.settings import PART_SIZE, Settings
from stasis.linux import blockdev, files

MAGIC = b"STASISDS"
# magic, version, kind, limit, portion, capacity (allocated), requested (usable), filled, flags
HEADER = struct.Struct("<8sIIQQQQQI")
HEADER_SIZE = 4096
LARGEST_LEASE = 16 << 20

FLAG_NO_SPACE = 1
FLAG_CREATED = 2


@dataclass(slots=True)
class Fill:
    """Fill level of a difference storage, in bytes."""

    kind: str
    limit: int
    portion: int
    capacity: int
    requested: int
    filled: int
    no_space: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class DiffStorage:
    """An open difference storage."""

    def __init__(self, fd: int, header_path: Path) -> None:
        self.fd = fd
        self._header_fd = os.open(header_path, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._header_fd, HEADER_SIZE)
        self._lease = (0, 0)
        self._thread_lock = threading.Lock()

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        target: str | int,
        header_path: Path,
        settings: Settings,
        *,
        limit: int | None = None,
        origins: Sequence[os.stat_result] = (),
    ) -> DiffStorage:
        """Open `target` (a path, "memory", or an open descriptor, which is duplicated) as a new storage.

        `limit` is in bytes and rounded down to 4 KiB; without one the backing's own size or free space is the
        limit. `origins` are the stat results of the devices that will be in the snapshot. Raises StorageError,
        BusyError, NotFoundError or PermissionDeniedError; nothing is left behind then.
        """
        portion = settings.diff_storage_minimum
        with contextlib.ExitStack() as undo:
            fd, kind, created = open_backing(target, limit)
            undo.callback(os.close, fd)
            if created and isinstance(target, str):
                undo.callback(remove, target)
            refuse_origins(fd, origins, str(target))
            capacity = capacity_of(fd, kind)
            limit = settle_limit(fd, kind, capacity, limit, str(target))
            portion = min(portion, limit)
            requested = first_portion(fd, kind, capacity, limit, portion, str(target))
            flags = FLAG_CREATED if created else 0
            header_path.write_bytes(
                HEADER.pack(MAGIC, 1, kind, limit, portion, requested, requested, PART_SIZE, flags).ljust(
                    HEADER_SIZE, b"\0"
                )
            )
            header_path.chmod(0o600)
            storage = cls(fd, header_path)
            undo.pop_all()
        return storage

    def close(self) -> None:
        """Close; the space is given back when the last worker does so."""
        self._map.close()
        os.close(self._header_fd)
        os.close(self.fd)

    def dispose(self, path: str | None) -> None:
        """At the snapshot's end: nobody may read its old contents later. Removes a file that `create` made."""
        fill = self.fill()
        if fill.kind == "device":
            # A disk that cannot discard keeps them; only root can read it.
            with contextlib.suppress(OSError):
                blockdev.discard(self.fd, 0, fill.filled)
        if fill.kind == "file":
            with contextlib.suppress(OSError):
                files.punch_hole(self.fd, 0, fill.filled)
            if path and self._read()[8] & FLAG_CREATED:
                remove(path)

    # -- space ------------------------------------------------------------------------------------

    def reserve(self, length: int) -> list[tuple[int, int]]:
        """Take `length` bytes (a multiple of 4 KiB): extents (offset, length). OSError ENOSPC when it is full."""
        extents: list[tuple[int, int]] = []
        while length:
            offset, left = self._lease
            if not left:
                offset, left = self._new_lease(length)
            took = min(left, length)
            self._lease = offset + took, left - took
            if extents and extents[-1][0] + extents[-1][1] == offset:
                extents[-1] = extents[-1][0], extents[-1][1] + took
            else:
                extents.append((offset, took))
            length -= took
        return extents

    def _new_lease(self, length: int) -> tuple[int, int]:
        with self._locked():
            fields = self._read()
            limit, portion, filled = fields[3], fields[4], fields[7]
            while fields[6] - filled < length and fields[6] < limit:
                # Another worker took all there was, and has not come to ask for growth yet.
                fields[6] = min(fields[6] + portion, limit)
            # Near the end leases get small, so that no device starves while another sits on space.
            want = max(length, min(LARGEST_LEASE, (limit - filled) // 16 // PART_SIZE * PART_SIZE))
            took = min(want, fields[6] - filled) // PART_SIZE * PART_SIZE
            if took < length:
                raise OSError(ENOSPC, "difference storage is full")
            fields[7] = filled + took
            if fields[2] in (KIND_FILE, KIND_UNNAMED) and filled + took > fields[5]:
                self._allocate_now(fields, fields[6])
            self._write(fields)
            return filled, took

    def _allocate_now(self, fields: list[Any], upto: int) -> None:
        """Space was taken faster than `grow` allocates it. Writing to space that is not allocated costs a file
        system three to eight times as much (measured on ext4), so it is done here and now."""
        try:
            files.allocate(self.fd, fields[5], upto - fields[5])
        except OSError as error:
            if error.errno != EOPNOTSUPP:
                raise
        fields[5] = upto

    def is_low(self) -> bool:
        """Whether `request_growth` may have something to do; needs no lock."""
        fields = HEADER.unpack_from(self._map)
        return bool(fields[6] - fields[7] <= fields[4] // 2 and not fields[8] & FLAG_NO_SPACE)

    def request_growth(self) -> tuple[int, int, int] | None:
        """When half a portion or less is left, raise what may be used: (old, new, limit), or None.

        The new space is usable at once; `grow` then allocates it. At the limit the answer has new == old, once.
        """
        with self._locked():
            fields = self._read()
            kind, limit, portion, requested, filled = fields[2], fields[3], fields[4], fields[6], fields[7]
            if requested - filled > portion // 2 or fields[8] & FLAG_NO_SPACE:
                return None
            new = min(requested + portion, limit)
            if kind == KIND_DEVICE or new == requested:
                fields[8] |= FLAG_NO_SPACE
                new = requested
            fields[6] = new
            self._write(fields)
            return requested, new, limit

    def grow(self, old: int, new: int) -> None:
        """Allocate what `request_growth` promised. If the file system is full, the limit comes down to what is."""
        try:
            files.allocate(self.fd, old, new - old)
        except OSError as error:
            if error.errno == EOPNOTSUPP:
                return
            with self._locked():
                fields = self._read()
                fields[3] = fields[6] = max(fields[5], fields[7])
                self._write(fields)
            raise
        with self._locked():
            fields = self._read()
            fields[5] = max(fields[5], new)
            self._write(fields)

    def fill(self) -> Fill:
        """The fill level now."""
        fields = self._read()
        return Fill(
            KIND_NAMES[fields[2]],
            fields[3],
            fields[4],
            fields[5],
            fields[6],
            fields[7],
            bool(fields[8] & FLAG_NO_SPACE),
        )

    def check(self) -> None:
        """Raise OSError if the kernel failed to write stored contents back to the disk."""
        files.writeback_error(self.fd)

    # -- shared page ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Two locks: `grow` runs in a thread of its own, and a file lock does not exclude threads that share its
        # open file. The first to let go would let other processes in on the second.
        with self._thread_lock:
            fcntl.flock(self._header_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._header_fd, fcntl.LOCK_UN)

    def _read(self) -> list[Any]:
        return list(HEADER.unpack_from(self._map))

    def _write(self, fields: Sequence[Any]) -> None:
        HEADER.pack_into(self._map, 0, *fields)


def private_descriptor(fd: int) -> int:
    """Open the same storage once more, so that writeback errors are reported to this process too.

    The kernel reports an error once per open file, and descriptors that were passed on share one.
    """
    return files.reopen(fd, os.O_RDWR)
