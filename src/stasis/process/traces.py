# SPDX-License-Identifier: Apache-2.0
"""What a restore leaves outside of its processes while it is under way: names that files have for a moment, System V
segments, control groups. Noted, before it is made, in memory that the guardian shares: a restore that fails or is
killed takes it back.

Nothing is taken back that others have made: a name only if it leads to the noted file still, a segment only if the
noted process made it, a group only if it is empty.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from stasis.errors import StasisError

__all__ = ["Traces", "group_made", "remove_made", "segment_made", "with_name"]

MOST_BYTES = 1 << 20
LENGTH = struct.Struct("<Q")
PATIENCE, PAUSE = 2.0, 0.01
"""Seconds until those who were killed have left their groups."""


class Traces:
    """Those of one restore, also for the processes that it forks. To be made before the guardian is."""

    _current: ClassVar[Traces | None] = None

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MOST_BYTES)

    @classmethod
    @contextmanager
    def of_restore(cls) -> Iterator[Traces]:
        """Those of the restore that is under way, or begins. Taken back where it fails."""
        if cls._current is not None:
            yield cls._current
            return
        cls._current = traces = cls()
        try:
            yield traces
        except BaseException:
            traces.undo()
            raise
        finally:
            cls._current = None

    @classmethod
    def note(cls, kind: str, *words: Any) -> int:
        """Note something that is about to be; what `forget` wants. StasisError where there is no room left."""
        traces = cls._current
        return 0 if traces is None else traces._note(marshal.dumps((kind, *words)))

    @classmethod
    def forget(cls, place: int) -> None:
        """It is gone again, and what was noted after it, too."""
        if cls._current is not None:
            LENGTH.pack_into(cls._current._memory, 0, place)

    @classmethod
    def undo_all(cls) -> None:
        """In a guardian: those of the restore that was under way when it was forked."""
        if cls._current is not None:
            cls._current.undo()

    def clear(self) -> None:
        """All is there to stay."""
        LENGTH.pack_into(self._memory, 0, 0)

    def undo(self) -> None:
        """Take everything back, the last first. May be called again."""
        for kind, *words in reversed(self._noted()):
            with contextlib.suppress(OSError):
                _take_back(kind, words)
        self.clear()

    def _note(self, record: bytes) -> int:
        (used,) = LENGTH.unpack_from(self._memory)
        start, noted = LENGTH.size + used, LENGTH.pack(len(record)) + record
        if start + len(noted) > MOST_BYTES:
            raise StasisError("a restore would leave too many traces to note")
        self._memory[start : start + len(noted)] = noted
        LENGTH.pack_into(self._memory, 0, used + len(noted))
        return int(used)

    def _noted(self) -> list[tuple[Any, ...]]:
        (used,) = LENGTH.unpack_from(self._memory)
        found, at = [], LENGTH.size
        while at < LENGTH.size + used:
            (length,) = LENGTH.unpack_from(self._memory, at)
            at += LENGTH.size + length
            found.append(marshal.loads(self._memory[at - length : at]))
        return found


@contextmanager
def with_name(path: str, status: os.stat_result | None = None) -> Iterator[None]:
    """A file has a name for a moment that it may not keep. Without `status` the name is nobody else's."""
    place = Traces.note("name", path, *((status.st_dev, status.st_ino) if status is not None else ()))
    try:
        yield
    finally:
        Traces.forget(place)


def segment_made(number: int) -> None:
    """This process is about to make a segment with this id."""
    Traces.note("segment", number, os.getpid())


def group_made(path: str) -> None:
    """A control group is about to be made."""
    Traces.note("group", path)


def _take_back(kind: str, words: list[Any]) -> None:
    if kind == "name":
        _name(*words)
    elif kind == "segment":
        remove_made(*words)
    else:
        _group(*words)


def _name(path: str, *identity: int) -> None:
    found = os.lstat(path)
    if identity and (found.st_dev, found.st_ino) != identity:
        return
    if stat.S_ISDIR(found.st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


def remove_made(number: int, creator: int) -> None:
    """A segment, if this process made it; where it is mapped it goes with the last mapping."""
    from stasis.linux import sysvshm

    found = sysvshm.segments().get(number)
    if found is not None and found.creator == creator:
        sysvshm.remove(number)


def _group(path: str) -> None:
    """It may have groups or processes of others by now; those of ours are about to leave it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.rmdir(path)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                return
        time.sleep(PAUSE)
