# SPDX-License-Identifier: Apache-2.0
"""Writing much to one file without filling the page cache with it.

What was written is sent to the disk a window at a time, and leaves the page cache when it is there. The next window
then finds pages that were in use a moment ago, the rest of the system keeps its cache, and the fsync at the end has
little to do. Measured in a virtual machine, CPU for 1 GiB in writes of 64 KiB: 0.3 s instead of 1.4 to 2.2 s.
"""

import errno
import os
import threading

from stasis.linux import files

__all__ = ["WriteBehind"]

WINDOW = 4 << 20

Extents = list[tuple[int, int]]


class WriteBehind:
    """What is on its way to the disk of one descriptor. May be used by several threads."""

    def __init__(self, fd: int, window: int = WINDOW) -> None:
        self._fd = fd
        self._window = window
        self._lock = threading.Lock()
        self._written: Extents = []
        self._size = 0
        self._under_way: Extents = []
        self._error: OSError | None = None

    def wrote(self, offset: int, length: int) -> None:
        """These bytes were written just now. Raises the OSError of a writeback that failed, now and ever after."""
        with self._lock:
            if self._written and sum(self._written[-1]) == offset:
                self._written[-1] = self._written[-1][0], self._written[-1][1] + length
            else:
                self._written.append((offset, length))
            self._size += length
            if self._size < self._window:
                return
            start, self._written, self._size = self._written, [], 0
            settle, self._under_way = self._under_way, start
        try:
            for extent in start:
                files.start_writeback(self._fd, *extent)
            for extent in settle:
                files.wait_writeback(self._fd, *extent)
                os.posix_fadvise(self._fd, *extent, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ESPIPE, errno.ENOSYS):  # else the file system has no such thing
                self._error = error
        self.check()

    def check(self) -> None:
        """Raise the OSError of a writeback that failed: the kernel tells of it once, a later fsync would not."""
        if self._error is not None:
            raise self._error
