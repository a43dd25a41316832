# SPDX-License-Identifier: Apache-2.0
"""Difference storage for modules that want to be told sectors (blksnap to v5): a file of ours, handed over bit by bit.

The module writes to these sectors behind the back of the file system. So the file must stay where it is: it has a name
that outlives this process, it is immutable for everybody as soon as it is handed over, and files whose contents the
file system keeps elsewhere or in another form (copy-on-write, compressed, encrypted, not yet placed) are refused. It
goes only when the module has let go of the snapshot, which is later than its destroy where somebody still waits for it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stasis.blksnap.drivers.base import DriverEvent, Held
from stasis.blksnap.kernel import Kernel
from stasis.errors import BusyError, StasisError, StorageError
from stasis.linux import blockdev, fiemap, files

__all__ = ["Feeder"]

PORTION = 1 << 30
"""Bytes of the first portion where the module does not say how much it wants (diff_storage_minimum)."""
UNIT = 1 << 20
"""What is handed over is a multiple of this."""
RELEASE_PATIENCE = 60.0
"""Seconds for the module to let go of a snapshot: others may be waiting for its events."""
RELEASE_GRACE = 2.0
"""Seconds for what the module still writes after it has taken the images away."""
UNFIT = (
    fiemap.FIEMAP_EXTENT_UNKNOWN
    | fiemap.FIEMAP_EXTENT_DELALLOC
    | fiemap.FIEMAP_EXTENT_ENCODED
    | fiemap.FIEMAP_EXTENT_DATA_ENCRYPTED
    | fiemap.FIEMAP_EXTENT_SHARED
)

Append = Callable[[Held, tuple[int, int], Sequence[tuple[int, int]]], None]


class Feeder:
    """Gives the snapshots of one module their storage. What it must remember is in each snapshot's notes."""

    def __init__(self, kernel: Kernel, append: Append) -> None:
        """`append` hands ranges (offset, length) in bytes of the device with that number over to the module."""
        self._kernel = kernel
        self._append = append

    def begin(self, held: Held, event: DriverEvent | None) -> None:
        """Hand over the first portion: what the event of a new snapshot asks for, or what the file has."""
        path = held.storage
        try:
            status = os.stat(path)
            if stat.S_ISBLK(status.st_mode):
                self._whole_device(held)
                return
        except OSError as error:
            raise _unusable(path, error) from error
        is_directory = stat.S_ISDIR(status.st_mode)
        name = str(Path(path) / f"stasis-{held.uuid}.diff") if is_directory else path
        held.notes.update(file=name, made=is_directory)
        wanted = event.requested if event is not None and event.requested else PORTION
        there = 0 if is_directory else status.st_size
        if not self._hand_over(held, 0, max(there, min(wanted, _limit(held, 0)))):
            raise StorageError(f"the limit of {path} leaves no room for difference storage", hint="raise --limit")

    def _whole_device(self, held: Held) -> None:
        number = self._kernel.number(held.storage)
        assert number is not None
        with open(os.open(held.storage, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC), "rb", buffering=0) as device:
            self._append(held, number, [(0, blockdev.size(device.fileno()))])

    def feed(self, held: Held, event: DriverEvent) -> DriverEvent | None:
        """Answer a call for more: None, or the event that says why there is no more.

        How much was handed over is the size of the file, so that nothing is handed over twice, whoever died.
        """
        filled = 0
        if "file" in held.notes:
            with contextlib.suppress(StasisError, OSError):
                filled = os.stat(held.notes["file"]).st_size
                if self._hand_over(held, filled, event.requested):
                    return None
        if held.notes.get("no_space"):
            return None
        held.notes["no_space"] = True
        return DriverEvent("no_space", event.time, requested=filled)

    def _hand_over(self, held: Held, filled: int, wanted: int) -> bool:
        """Hand over `wanted` bytes from byte `filled` on, or what the limit leaves; False if it leaves nothing."""
        length = min(-(-wanted // UNIT) * UNIT, (_limit(held, filled) - filled) // UNIT * UNIT)
        if length <= 0:
            return False
        self._append(held, *_place(held.notes["file"], filled, length, create=filled == 0))
        return True

    def end(self, held: Held, images: Sequence[str]) -> None:
        """The snapshot is gone: its file may be changed again, and goes if we made it.

        The module takes the `images` away and then stops writing. BusyError if it does not: the file stays.
        """
        name = held.notes.get("file")
        if name is None or not os.path.exists(name):
            return
        if images:
            _await_release(name, images)
        with contextlib.suppress(OSError):
            files.set_immutable(name, False)
            if held.notes.get("made"):
                os.unlink(name)


def _await_release(name: str, images: Sequence[str]) -> None:
    deadline = time.monotonic() + RELEASE_PATIENCE
    while any(os.path.exists(image) for image in images):
        if time.monotonic() > deadline:
            raise BusyError(f"somebody still waits for events of a destroyed snapshot, so its storage {name} stays",
                            hint=f"end the other program; then destroy it again, or chattr -i {name} and remove it")
        time.sleep(0.05)
    time.sleep(RELEASE_GRACE)


def _limit(held: Held, filled: int) -> int:
    """The most bytes that the file may have: what was named, or what is free beside what it has."""
    if held.limit is not None:
        return held.limit
    space = os.statvfs(os.path.dirname(held.notes["file"]) or ".")
    return filled + space.f_bavail * space.f_frsize


def _place(name: str, offset: int, length: int, *, create: bool) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Reserve a stretch of the file: number of its device, and where the stretch lies there."""
    try:
        if not create:
            files.set_immutable(name, False)
        try:
            device, found = _allocate(name, offset, length)
        finally:
            files.set_immutable(name, True)  # also if there is no more room: the module uses what it has
    except OSError as error:
        raise _unusable(name, error) from error
    ranges = [_clipped(one, offset, offset + length) for one in found]
    if any(one.flags & UNFIT for one in found) or sum(size for _, size in ranges) != length:
        raise StorageError(f"{name} has no fixed place on its disk", hint="name a directory on ext4 or XFS")
    return (os.major(device), os.minor(device)), ranges


def _allocate(name: str, offset: int, length: int) -> tuple[int, list[fiemap.FileExtent]]:
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, offset, length)
        os.fsync(fd)
        return os.fstat(fd).st_dev, list(fiemap.extents(fd, offset, length, flags=fiemap.FIEMAP_FLAG_SYNC))
    finally:
        os.close(fd)


def _clipped(extent: fiemap.FileExtent, start: int, end: int) -> tuple[int, int]:
    low, high = max(extent.logical, start), min(extent.logical + extent.length, end)
    return extent.physical + low - extent.logical, high - low


def _unusable(path: str, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be used: {error.strerror}", errno=error.errno or 0,
                        hint="name a directory, file or block device on another disk")
