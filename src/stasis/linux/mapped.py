# SPDX-License-Identifier: Apache-2.0
"""Files mapped to be compared: no copy is made, and where they lie in memory already nothing is read."""

from __future__ import annotations

import ctypes
import mmap
from types import TracebackType
from typing import Self

from stasis.linux import libc

__all__ = ["MappedFile", "memcmp"]

MADV_POPULATE_READ = 22  # include/uapi/asm-generic/mman-common.h; since Linux 5.14 (commit 4ca9b3859dac)

_mmap = libc.libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap = libc.libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = libc.libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
memcmp = libc.libc.memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
"""memcmp(3), of two addresses of ours: 0 where they hold the same."""


class MappedFile:
    """The first `size` bytes of a file, which must not become shorter; a context manager that gives them back. `start`:
    the address. To look at a hole of a file in memory fills it. OSError."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        found = _mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if found == ctypes.c_void_p(-1).value:
            raise libc.error(ctypes.get_errno(), "mmap", fd)
        self.start = int(found)

    def prepare(self, offset: int, length: int) -> None:
        """Have a part of it there, so that it is not waited for later; a kernel that cannot do it leaves it so."""
        if length > 0:
            first = offset - offset % mmap.PAGESIZE
            _madvise(self.start + first, offset + length - first, MADV_POPULATE_READ)

    def close(self) -> None:
        """Unmap it; may be called again."""
        if self.start:
            _munmap(self.start, self.size)
            self.start = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
