# SPDX-License-Identifier: Apache-2.0
"""Bringing an image of snapshot n up to snapshot n+1: the blocks that the finished COW file lists are copied.

`update-img` is over within a few hundredths of a second where little changed. So this loads next to nothing, and what
it does per block is asking, receiving and writing: `bench/rows_datto.py` compares it with a loop that only reads and
writes.
"""

from __future__ import annotations

import _thread
import os
from errno import EINVAL

from stasis.datto.layout import BLOCK_SHIFT, BLOCK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Protocol

    from stasis.datto.cowreader import CowReader

    class Source(Protocol):
        """Where the snapshot is read (`nbd.bulkread` is one)."""

        def read_each(self, extents: Iterable[Extent]) -> Iterator[tuple[int, int, memoryview | None]]:
            """Offset, length and contents of all places in these extents; None for what cannot be read.

            Contents are good until the next are asked for. ConnectionError or TimeoutError if no more can be read.
            """

__all__ = ["Result", "Source", "check_follows", "describe", "place_in_series", "update"]

Extent = tuple[int, int]
"""Offset and length in bytes."""

STEP_BLOCKS = 512
"""Blocks between two calls of `progress`, after which what was written is sent to the disk, too."""


class Result:
    """Blocks of 4 KiB that changed, and how many of them could not be copied."""

    __slots__ = ("changed", "errors")

    def __init__(self, changed: int, errors: int) -> None:
        self.changed, self.errors = changed, errors


_KIND = "dattobd snapshot"


def describe(uuid: bytes, seqid: int) -> str:
    """How the export of a snapshot says which one it is."""
    return f"{_KIND} {seqid} of {uuid.hex()}"


def place_in_series(description: str) -> tuple[str, int] | None:
    """UUID and number of the snapshot out of its export's description; None if that does not tell."""
    words = description.removeprefix(_KIND).split()
    if not description.startswith(_KIND) or len(words) != 3 or not words[0].isdecimal():
        return None
    return words[2], int(words[0])


def check_follows(reader: CowReader, uuid: str, seqid: int) -> None:
    """Whether the snapshot (uuid, seqid) is the one after that of the COW file. StateError (EINVAL)."""
    header = reader.header
    problem = hint = ""
    if header.uuid.hex() != uuid:
        problem, hint = "cow file uuid does not match snapshot", "it is of another series"
    elif header.seqid + 1 != seqid:
        problem = "snapshot provided does not immediately follow the snapshot that created the cow file"
        hint = f"the file is of snapshot {header.seqid}, the snapshot is number {seqid}"
    elif not (header.is_clean and header.is_index_only):
        problem, hint = f"{reader.path} is not finished", "transition-to-snapshot finishes it"
    if problem:
        from stasis.errors import StateError

        raise StateError(problem, errno=EINVAL, hint=hint)


def update(source: Source, reader: CowReader, target: int,
           progress: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Copy what changed from `source` to the descriptor `target`, and make it durable.

    `progress` is called with blocks done and blocks in all. A block that cannot be copied is counted and the rest is
    copied; OSError if the image cannot be made durable.
    """
    durable = _Durable(target)

    def step(done: int, total: int) -> None:
        durable.begin()
        progress(done, total)

    copy = _Copy(source, target, sum(end - first for first, end in reader.changed()), step)
    try:
        copy.run(reader.extents())
    finally:
        durable.wait()
    progress(copy.total, copy.total)
    durable.finish()
    return Result(copy.total, copy.errors)


class _Durable:
    """Has the disk write while more is copied: at the end little is left to wait for."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._running = _thread.allocate_lock()  # `threading` takes 2 ms to load
        self._error: OSError | None = None

    def begin(self) -> None:
        """Begin with what was written up to now, unless the disk is still busy with what was before."""
        if not self._running.acquire(blocking=False):
            return
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # no more threads: it is all done at the end
            self._running.release()

    def _run(self) -> None:
        try:
            os.fdatasync(self._target)
        except OSError as error:
            self._error = error  # the kernel tells of it once
        finally:
            self._running.release()

    def wait(self) -> None:
        """Until nothing is under way."""
        with self._running:
            pass

    def finish(self) -> None:
        """All of it. The OSError of any writeback that failed."""
        if self._error is not None:
            raise self._error
        os.fdatasync(self._target)  # the image keeps its length and its place, so that times are all that is left out


class _Copy:
    """`total` blocks to copy, of which `errors` could not be."""

    def __init__(self, source: Source, target: int, total: int, progress: Callable[[int, int], None]) -> None:
        self._source, self._target, self._progress = source, target, progress
        self.total, self.errors = total, 0
        self._done = 0

    def run(self, extents: Iterable[Extent]) -> None:
        """Copy all that can be; of a piece with an error each block is tried by itself."""
        try:
            failed = self._copy(extents)
            self.errors = len(self._copy(_blocks(failed)))
        except (ConnectionError, TimeoutError):
            self.errors = self.total - self._done

    def _copy(self, extents: Iterable[Extent]) -> list[Extent]:
        """What could not be copied."""
        # Hot: half of what update-img does beside waiting for the disk.
        target, pwrite, failed = self._target, os.pwrite, []
        told = self._done
        for offset, length, contents in self._source.read_each(extents):
            try:
                copied = contents is not None and pwrite(target, contents, offset) == length
            except OSError:
                copied = False
            if not copied:
                failed.append((offset, length))
                continue
            self._done += -(-length >> BLOCK_SHIFT)
            if self._done - told >= STEP_BLOCKS:
                told = self._done
                self._progress(told, self.total)
        return failed


def _blocks(extents: Iterable[Extent]) -> Iterator[Extent]:
    for first, length in extents:
        for offset in range(first, first + length, BLOCK_SIZE):
            yield offset, min(BLOCK_SIZE, first + length - offset)
