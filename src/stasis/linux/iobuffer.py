# SPDX-License-Identifier: Apache-2.0
"""Page-aligned memory for I/O.

Direct I/O and io_uring want buffers whose address is known and aligned to a page, and a server with many
connections wants to give memory back while they are idle. Neither is possible with `bytearray`; an anonymous
private mapping does both.
"""

from __future__ import annotations

import ctypes
import mmap
from types import TracebackType

__all__ = ["PAGE_SIZE", "IoBuffer"]

PAGE_SIZE = mmap.PAGESIZE


class IoBuffer:
    """Anonymous memory of `size` bytes (rounded up to whole pages), zeroed; pages are taken when first
    touched."""

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise ValueError(f"buffer size must be positive, not {size}")
        self.size = -(-size // PAGE_SIZE) * PAGE_SIZE
        # Private and not the default shared: MADV_DONTNEED gives the pages of shared memory back only from
        # this process's page table, not to the machine.
        self._mapping = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._mapping)
        # The ctypes object pins the mapping only while it lives, which is until the end of this line.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def release_pages(self) -> None:
        """Give the memory back to the system; the contents are zeroes afterwards."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap. Safe to call twice. Where a slice of `view` is still alive, the mapping goes when that
        goes."""
        self.view.release()
        try:
            self._mapping.close()
        except BufferError:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> IoBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
