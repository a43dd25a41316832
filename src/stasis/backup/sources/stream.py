# SPDX-License-Identifier: Apache-2.0
"""Standard input as a source: read once, from the start to the end, whose place nobody knows before.

Several threads read it in turns. A reader asks for the extent that it was told to read, and waits until those before it
have been read by the others.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Sequence

from stasis.backup.source import Extent, Mark
from stasis.errors import GenerationError, StasisError

__all__ = ["StreamSource"]

LOOK_UP_SECONDS = 0.2


class StreamSource:
    """A pipe or file open for reading. `size` is None until the end was met; `position` is how much was read."""

    kind = "stdin"
    block_size = 0
    mark: Mark | None = None
    taken: float | None = None

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.path, self.identity = name, "-", "stdin"
        self.size: int | None = None
        self._fd = fd
        self._turn = threading.Condition()
        self.position = 0
        self._failed = False

    def changed_since(self, mark: Mark) -> list[Extent]:
        """Never known. Raises GenerationError."""
        raise GenerationError("changes of standard input are not tracked", hint="stasis device attach tracks a disk's")

    def zero_extents(self) -> list[Extent]:
        """Nothing is known before it is read."""
        return []

    def open_reader(self) -> StreamReader:
        """A reader that takes its turns with the others."""
        return StreamReader(self)

    def disturbed(self) -> str:
        """A stream has no second state."""
        return ""

    def distrust(self, reason: str) -> None:
        """Nothing is tracked, so there is nothing to distrust."""

    def read_turn(self, offset: int, view: memoryview) -> int:
        """Fill the view from `offset` on, once it is its turn; less than that at the end of the stream only."""
        with self._turn:
            self._turn.wait_for(lambda: self._failed or self.position >= offset or self.size is not None)
            if self._failed:
                raise StasisError("reading standard input was given up", errno=errno.ECANCELED)
            if self.position != offset:
                return 0  # the stream ended before our turn
            try:
                got = self._fill(view)
            except BaseException:
                self._failed = True
                raise
            finally:
                self._turn.notify_all()
            self.position += got
            if got < len(view):
                self.size = self.position
            return got

    def give_up(self) -> None:
        """Let every reader that waits fail."""
        self._failed = True

    def _fill(self, view: memoryview) -> int:
        try:
            return self._fill_view(view)
        except OSError as error:
            raise StasisError(f"standard input cannot be read: {error.strerror}", errno=error.errno or 0) from error

    def _fill_view(self, view: memoryview) -> int:
        """Read as much as there is, up to the view's length; looks up now and then whether it was given up."""
        got = 0
        while got < len(view):
            if not select.select([self._fd], [], [], LOOK_UP_SECONDS)[0]:
                if self._failed:
                    raise OSError(errno.ECANCELED, "reading standard input was given up")
                continue
            count = os.readv(self._fd, [view[got:]])
            if not count:
                break
            got += count
        return got


class StreamReader:
    """A thread's turns at the stream."""

    def __init__(self, source: StreamSource) -> None:
        self._source = source

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """As `read_available`, with zeroes behind the end."""
        got = self.read_available(extents, buffer)
        buffer[got : sum(length for _, length in extents)] = bytes(sum(length for _, length in extents) - got)

    def read_available(self, extents: Sequence[Extent], buffer: memoryview) -> int:
        """Read one extent as far as the stream goes; the bytes that were there."""
        (offset, length), = extents
        return self._source.read_turn(offset, buffer[:length])

    def abort(self) -> None:
        """End the waiting of all readers."""
        self._source.give_up()

    def close(self) -> None:
        """The stream stays open: it belongs to whoever started us."""
