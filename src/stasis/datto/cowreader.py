# SPDX-License-Identifier: Apache-2.0
"""Reading a finished COW file: which blocks changed, and what was kept of them.

It reads what dattobd's kernel module leaves as well as what is written here. The file does not say how large its
device was; the reader is told, and checks what it can.
"""

from __future__ import annotations

import os

from stasis.datto.layout import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    HEADER_AREA,
    SECTION_BLOCKS,
    SECTION_SHIFT,
    SECTION_SIZE,
    Geometry,
    Header,
)
from stasis.datto.scan import Census, Run, census, runs_of_index

# `update-img` does little beside this: what only failures need is loaded when they happen.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from stasis.errors import StasisError

__all__ = ["CowReader"]

KEPT_RUNS = 1 << 16
"""As many runs are remembered from the first look at the index; of a file with more it is read a second time."""


class CowReader:
    """A COW file of a device of `size` bytes, open for reading; a context manager."""

    def __init__(self, path: str, size: int) -> None:
        """Raises NotFoundError, PermissionDeniedError, UsageError, or StateError and DamagedError as its header is."""
        self.path, self.geometry = path, Geometry(size)
        self._fd = _open(path)
        try:
            self.header = Header.unpack(os.pread(self._fd, 64, 0), path)
            self._length = os.fstat(self._fd).st_size
            self._indexed = self._written_with()
            self._check()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> CowReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _check(self) -> None:
        if self._length < self._indexed.data_offset:
            raise _damaged(f"{self.path} ends inside its index", hint="it was cut off, or the device was smaller")
        counted = self._count()
        if self._is_of_another_size(counted):
            raise _mismatch(f"{self.path} is damaged, or of a device of another size: entries point outside its data")
        if self.header.version and counted.changed < self.header.changed_blocks:
            raise _mismatch(f"{self.path} is damaged, or of a larger device: it has {counted.changed} entries,"
                            f" its header says {self.header.changed_blocks}")

    def _count(self) -> Census:
        """Count the entries, and remember the runs if they are few."""
        counted = Census()
        kept: list[Run] = []
        for runs in runs_of_index(self._fd, self._indexed.sections, counted):
            if len(kept) <= KEPT_RUNS:
                kept += runs
        self._kept = kept if len(kept) <= KEPT_RUNS else None
        return counted

    def _is_of_another_size(self, counted: Census) -> bool:
        first, length = self._indexed.first_slot, self._length
        if self.header.is_index_only and length != self._indexed.data_offset and not (
                length - HEADER_AREA) % SECTION_SIZE:
            return True  # cut off behind an index, but not this one's
        if not counted.pointing:
            return False
        begins = counted.lowest >= first if self.header.is_index_only else counted.lowest == first
        return not begins or counted.highest >= self.header.fpos

    def _written_with(self) -> Geometry:
        """The geometry the file was written with.

        dattobd does not count a short last block. That shows where this block would have begun a section: the file
        then has none for it, and is a section shorter, or has its first data there.
        """
        whole = Geometry(self.geometry.size >> BLOCK_SHIFT << BLOCK_SHIFT)
        if whole.sections == self.geometry.sections:
            return self.geometry
        if self._length < self.geometry.data_offset:
            return whole
        counted = census(self._fd, whole)
        return whole if counted.pointing and counted.lowest == whole.first_slot else self.geometry

    def changed(self) -> Iterator[Run]:
        """Runs of changed blocks, ascending; a run may end where the next one begins."""
        blocks = self.geometry.blocks
        for runs in runs_of_index(self._fd, self._indexed.sections) if self._kept is None else [self._kept]:
            for first, end in runs:
                if first < blocks:
                    yield first, min(end, blocks)
        if self._indexed != self.geometry:
            yield blocks - 1, blocks  # never looked at, so it may have changed

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of what changed, ascending, neighbours joined."""
        start = end = 0
        for first, stop in self.changed():
            if first != end:
                if end > start:
                    yield self._bytes(start, end)
                start = first
            end = stop
        if end > start:
            yield self._bytes(start, end)

    def _bytes(self, first: int, end: int) -> tuple[int, int]:
        offset = first << BLOCK_SHIFT
        return offset, min(end << BLOCK_SHIFT, self.geometry.size) - offset

    def kept(self, block: int) -> bytes | None:
        """Old contents of a block, 4096 bytes, or None where none were kept. OSError, or StateError for a bad entry."""
        from stasis.linux import files

        number, low = block >> SECTION_SHIFT, block & (SECTION_BLOCKS - 1)
        data = bytearray(8)
        files.transfer_rest(os.preadv, self._fd, [memoryview(data)], HEADER_AREA + number * SECTION_SIZE + low * 8, 0)
        slot = memoryview(data).cast("Q")[0]
        if slot <= 1 or self.header.is_index_only:
            return None
        contents = bytearray(BLOCK_SIZE)
        files.transfer_rest(os.preadv, self._fd, [memoryview(contents)], slot << BLOCK_SHIFT, 0)
        return bytes(contents)


def _damaged(message: str, hint: str) -> StasisError:
    from stasis.errors import DamagedError

    return DamagedError(message, hint=hint)


def _mismatch(message: str) -> StasisError:
    from stasis.errors import StateError

    return StateError(message)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _not_readable(path, error) from error


def _not_readable(path: str, error: OSError) -> StasisError:
    from stasis.errors import NotFoundError, PermissionDeniedError, UsageError

    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"there is no COW file {path}")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{path} cannot be read", hint="run as its owner", errno=error.errno or 0)
    return UsageError(f"{path} cannot be read: {error.strerror}", errno=error.errno or 0)
