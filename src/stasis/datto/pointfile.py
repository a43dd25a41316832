# SPDX-License-Identifier: Apache-2.0
"""What `update-img` reads of a live device's snapshot: the file with the blocks that changed before it."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

__all__ = ["PointFile"]

WINDOW = 1 << 20


class PointFile:
    """A source for `update`; a context manager. `size` is that of the device, in bytes."""

    def __init__(self, path: str) -> None:
        """OSError if it cannot be opened."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size
        self._buffer = memoryview(bytearray(WINDOW))

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> PointFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def read_each(self, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, memoryview | None]]:
        """Offset, length and contents of all places in the extents, None for what cannot be read.

        Contents are good until the next are asked for.
        """
        for offset, length in extents:
            for start in range(offset, offset + length, WINDOW):
                view = self._buffer[: min(WINDOW, offset + length - start)]
                yield start, len(view), view if self._fill(view, start) else None

    def _fill(self, view: memoryview, offset: int) -> bool:
        try:
            while view:
                done = os.preadv(self._fd, [view], offset)
                if not done:
                    return False
                view, offset = view[done:], offset + done
        except OSError:
            return False
        return True
