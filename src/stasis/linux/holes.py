# SPDX-License-Identifier: Apache-2.0
"""Where a file has data and where holes. Apart from `files`, since a short command loads this and no ctypes."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["data_extents"]


def data_extents(fd: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (offset, length, is_data) in bytes that together cover the range; neighbours differ.

    What lies behind the end of the file is a hole. A file system that does not tell gives one extent of data.
    Moves the file position of fd.
    """
    end = offset + length
    while offset < end:
        data = _seek(fd, offset, os.SEEK_DATA, end)
        if data > offset:
            yield offset, data - offset, False
        if data < end:
            hole = _seek(fd, data, os.SEEK_HOLE, end)
            yield data, hole - data, True
            data = hole
        offset = data


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """Where the next data or hole begins, at most end."""
    try:
        return min(os.lseek(fd, offset, whence), end)
    except OSError as e:
        if e.errno == errno.ENXIO:  # no data behind offset, or offset behind the end of the file
            return end
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot tell: all is data
            return offset if whence == os.SEEK_DATA else end
        from stasis.linux import libc

        raise libc.error(e.errno, "lseek", fd) from e
