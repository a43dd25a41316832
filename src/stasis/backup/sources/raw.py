# SPDX-License-Identifier: Apache-2.0
"""Image files and block devices as they lie there: read whole, nothing is tracked.

Nobody holds writers back while such a source is read. What can be seen of writes meanwhile (modification time,
write counters) is compared at the end, so that a backup that mixes two states says so.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from stasis.backup.source import Extent, Mark
from stasis.errors import GenerationError, NotFoundError, PermissionDeniedError, StasisError, UsageError
from stasis.linux import blockdev, files

__all__ = ["RawSource", "identity_of"]

# A read of the kernel is at most this long (MAX_RW_COUNT is 2 GiB less a page); larger ones gain nothing.
LONGEST_READ = 32 << 20
Signs = tuple[int, ...]


class RawSource:
    """A regular file or block device, open for reading; a context manager."""

    def __init__(self, name: str, path: str) -> None:
        """Open it. Raises NotFoundError, PermissionDeniedError, UsageError for what is neither file nor device."""
        self.name, self.path = name, os.path.abspath(path)
        self.mark: Mark | None = None
        self.taken: float | None = None
        self.block_size = 0
        self._fd = _open(self.path)
        try:
            is_device = blockdev.is_block_device(self._fd)
            self.kind = "device" if is_device else "file"
            self.size: int | None = blockdev.size(self._fd)
            self.identity = identity_of(self.path)
            self._before = self._signs()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> RawSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def changed_since(self, mark: Mark) -> list[Extent]:
        """Never known. Raises GenerationError."""
        raise GenerationError(f"changes of {self.path} are not tracked", hint="stasis device attach tracks them")

    def zero_extents(self) -> list[Extent]:
        """The holes of a file; nothing for a device."""
        if self.kind == "device":
            return []
        extents = files.data_extents(self._fd, 0, self.size or 0)
        return [(offset, length) for offset, length, is_data in extents if not is_data]

    def open_reader(self) -> RawReader:
        """A reader that shares the open file."""
        return RawReader(self._fd, self.path)

    def distrust(self, reason: str) -> None:
        """Nothing is tracked, so there is nothing to distrust."""

    def disturbed(self) -> str:
        """How the source was seen to change since it was opened; empty if it was not."""
        if self._signs() == self._before:
            return ""
        return f"{self.path} was written to while it was read, so the backup may mix two states"

    def _signs(self) -> Signs:
        """What writes change: size and modification time, or the write counters of a device."""
        if self.kind == "device":
            return blockdev.write_counters(self._fd) or ()
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


class RawReader:
    """Positioned reads from a file that others read too."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = os.dup(fd)
        self._path = path

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Read extents into the buffer, one right behind the other. Raises OSError."""
        position = 0
        for offset, length in extents:
            self._read(offset, buffer[position : position + length])
            position += length

    def _read(self, offset: int, view: memoryview) -> None:
        while view:
            got = os.preadv(self._fd, [view[:LONGEST_READ]], offset)
            if not got:
                raise OSError(errno.EIO, "the source is shorter than it was", self._path)
            view, offset = view[got:], offset + got

    def abort(self) -> None:
        """Nothing to do: a read of a disk ends by itself."""

    def close(self) -> None:
        """Close our descriptor."""
        os.close(self._fd)


def _open(path: str) -> int:
    try:
        # O_NONBLOCK: a FIFO must not keep us waiting before it is refused.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}",
                            hint="give a served device, an image file or a block device") from None
    except PermissionError:
        raise PermissionDeniedError(f"{path} cannot be read by this user", hint="run the backup as root") from None
    except OSError as error:
        raise StasisError(f"{path} cannot be opened: {error.strerror}", errno=error.errno or 0) from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise UsageError(f"{path} is neither a regular file nor a block device",
                         hint="- with --name reads standard input")
    return fd


def identity_of(path: str) -> str:
    """What tells a file or device from another one at the same path; stays the same over a restart of the machine.

    The inode of a file. A device's numbers are drawn anew at each boot, so that there its link in /dev/disk/by-id is
    taken, or else its path alone.
    """
    try:
        info = os.stat(path)
    except OSError:
        return path
    if stat.S_ISBLK(info.st_mode):
        return f"{_stable_link(info.st_rdev) or path}"
    return f"{path} inode {info.st_ino}"


def _stable_link(rdev: int) -> str:
    """The first name in /dev/disk/by-id that leads to the device; udev keeps them."""
    try:
        links = sorted(Path("/dev/disk/by-id").iterdir())
    except OSError:
        return ""
    for link in links:
        try:
            if link.stat().st_rdev == rdev:
                return str(link)
        except OSError:
            continue  # a link that leads nowhere
    return ""
