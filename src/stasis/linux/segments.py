# SPDX-License-Identifier: Apache-2.0
"""What of a file in memory is there, in whole pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

__all__ = ["data_segments"]

PAGE = 4096


def data_segments(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole, in whole pages."""
    status = os.fstat(fd)
    if status.st_blksize > PAGE:  # hugetlbfs tells nothing of holes
        step = status.st_blksize
        yield from ((start, start + step) for start in range(0, status.st_size, step) if any(os.pread(fd, step, start)))
        return
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # no data behind
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, -(-position // PAGE) * PAGE
