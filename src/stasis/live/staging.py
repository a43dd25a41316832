# SPDX-License-Identifier: Apache-2.0
"""A file beside the memory that takes what changes while a live device is copied, where that is more than fits there.

It has no name, so that nothing is left of it in any case, and its space is allocated before it is needed. It must not
lie on a file system that is frozen: `LiveSet` refuses that.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from stasis.errors import StorageError
from stasis.linux import files

__all__ = ["StagingArea", "free_space"]


def free_space(directory: Path, limit: int | None) -> int:
    """Bytes that may be staged in a directory now. Raises StorageError."""
    try:
        found = os.statvfs(directory)
    except OSError as error:
        raise _unusable(directory, error) from error
    free = found.f_bavail * found.f_frsize
    return free if limit is None else min(free, limit)


class StagingArea:
    """The file; sizes in bytes. limit None: what is free there."""

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        """Make it. Raises StorageError."""
        self.directory, self.limit, self.used = directory, limit, 0
        try:
            self._fd = files.open_unnamed(str(directory))
        except OSError as error:
            raise _unusable(directory, error) from error

    def take(self, length: int) -> int | None:
        """Allocate so much; where it is, or None if there is no more space. Raises StorageError."""
        if self.limit is not None and self.used + length > self.limit:
            return None
        try:
            self._allocate(length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return None
            raise _unusable(self.directory, error) from error
        place, self.used = self.used, self.used + length
        return place

    def _allocate(self, length: int) -> None:
        try:
            files.allocate(self._fd, self.used, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            os.pwrite(self._fd, bytes(length), self.used)

    def write(self, place: int, data: memoryview) -> None:
        """Keep data at a place that was taken. Raises StorageError."""
        try:
            while data:
                done = os.pwrite(self._fd, data, place)
                data, place = data[done:], place + done
        except OSError as error:
            raise _unusable(self.directory, error) from error

    def read(self, place: int, view: memoryview) -> None:
        """Fill the view with what was kept. Any thread may call it. Raises StorageError."""
        try:
            while view:
                done = os.preadv(self._fd, [view], place)
                if not done:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                view, place = view[done:], place + done
        except OSError as error:
            raise _unusable(self.directory, error) from error

    def close(self) -> None:
        """Give the space back."""
        os.close(self._fd)


def _unusable(directory: Path, error: OSError) -> StorageError:
    return StorageError(f"the staging area {directory} cannot be used: {error.strerror}", errno=error.errno or 0,
                        hint="name a directory on another file system with --staging; nothing is lost")
