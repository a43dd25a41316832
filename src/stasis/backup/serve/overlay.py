# SPDX-License-Identifier: Apache-2.0
"""Scratch space over a backup: what clients write lies in a file without a name, and is gone when the server ends.

A byte of state per block of 4 KiB says where the block's contents are. A block lies in the file at the offset that it
has in the backup; the file is sparse, and trimming gives its space back.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from errno import EIO, ENOTSUP, EOPNOTSUPP

from stasis.backup.serve.export import BackupExport
from stasis.block.exports import BASE_ALLOCATION, NBD_STATE_HOLE, NBD_STATE_ZERO, Status
from stasis.errors import NotFoundError, PermissionDeniedError, StorageError
from stasis.linux import files
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.export import Export, Request

__all__ = ["OverlayExport", "Scratch", "default_directory"]

BLOCK_SHIFT = 12
BLOCK = 1 << BLOCK_SHIFT
_STEP = 16 << 20
"""Bytes that one step of a trim or of writing zeroes goes through."""
_MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h; in Python's mmap since 3.13

BASE, HERE, CLEAR = 0, 1, 2
"""Where a block's contents are: in the backup, in the scratch file, or nowhere since it is all zeroes.

The file holds zeroes wherever a block is CLEAR; after a write that failed, some of what that should have written."""


def default_directory() -> str:
    """TMPDIR, else /var/tmp, which unlike /tmp is a disk on most hosts."""
    return os.environ.get("TMPDIR") or "/var/tmp"


_RUN = re.compile(b"\0+|\1+|\2+")


class Scratch:
    """The file and the states of the blocks of an export of `size` bytes."""

    def __init__(self, directory: str, size: int) -> None:
        """Raises NotFoundError, PermissionDeniedError or StorageError about the directory."""
        self.fd = _open(directory, size)
        self._mapping = _states(-(-size // BLOCK))
        self.states = memoryview(self._mapping)

    def close(self) -> None:
        """Let go of all that was written."""
        self.states.release()
        self._mapping.close()
        os.close(self.fd)

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(first byte, number of bytes, state) of the stretches of a range, without gaps; neighbours differ."""
        end = offset + length
        first = offset >> BLOCK_SHIFT
        states = bytes(self.states[first : -(-end // BLOCK)])
        for run in _RUN.finditer(states):
            until = min(end, (first + run.end()) << BLOCK_SHIFT)
            yield offset, until - offset, states[run.start()]
            offset = until

    def set_state(self, offset: int, length: int, state: int) -> None:
        """The blocks that a range touches have this state from now on."""
        first, stop = offset >> BLOCK_SHIFT, -(-(offset + length) // BLOCK)
        self.states[first:stop] = bytes((state,)) * (stop - first)


def _open(directory: str, size: int) -> int:
    try:
        fd = files.open_unnamed(directory)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{directory} is no directory", hint="name one with --overlay DIR") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"no file can be made in {directory}: {error.strerror}",
                                    hint="name another directory with --overlay DIR") from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise StorageError(f"the file system of {directory} holds no file of {size} bytes: {error.strerror}",
                           hint="name a directory on another one with --overlay DIR", errno=error.errno) from error
    return fd


def _states(count: int) -> mmap.mmap:
    # Pages are taken when they are first written to: a byte for each 4 KiB written, at worst a page for each 16 MiB.
    return mmap.mmap(-1, max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)


class OverlayExport(Export):
    """A backup that can be written to as long as it is served."""

    can_multi_conn = True
    can_trim = True
    can_zero = True
    can_cache = True
    reports_holes = True

    def __init__(self, base: BackupExport, scratch: Scratch) -> None:
        self.name, self.description, self.size = base.name, base.description, base.size
        self._base, self._scratch = base, scratch

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        view = buffer.view
        below: list[Request] = []
        for offset, length, position in requests:
            for start, count, state in self._scratch.runs(offset, length):
                at = position + start - offset
                if state == BASE:
                    below.append((start, count, at))
                elif state == HERE:
                    self._load(view[at : at + count], start)
                else:
                    view[at : at + count] = bytes(count)
        if below:
            self._base.read_into(view, below)

    def _load(self, place: memoryview, offset: int) -> None:
        if os.preadv(self._scratch.fd, [place], offset) != len(place):
            raise OSError(EIO, "the scratch file ends early")

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        view = buffer.view
        for offset, length, position in requests:
            self._fetch_edges(offset, length)
            self._store(view[position : position + length], offset)
            self._scratch.set_state(offset, length, HERE)

    def _store(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwritev(self._scratch.fd, [data], offset)
            data, offset = data[written:], offset + written

    def _fetch_edges(self, offset: int, length: int) -> None:
        """Bring blocks that are about to be written in part into the file."""
        for block in dict.fromkeys(_cut_blocks(offset, length, self.size)):
            if self._scratch.states[block] == BASE:
                start = block << BLOCK_SHIFT
                data = memoryview(bytearray(min(BLOCK, self.size - start)))
                self._base.read_into(data, [(start, len(data), 0)])
                self._store(data, start)
                self._scratch.states[block] = HERE

    def flush(self) -> None:
        """What was written need not survive anything; that it could not be kept until now would be worth knowing."""
        files.writeback_error(self._scratch.fd)

    def trim(self, offset: int, length: int) -> Iterator[None]:
        return self.write_zeroes(offset, length, punch=True, fast=False)

    def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> Iterator[None]:
        end = offset + length
        while offset < end:
            count = min(end, (offset // _STEP + 1) * _STEP) - offset
            self._zero(offset, count, punch)
            offset += count
            yield

    def _zero(self, offset: int, length: int, punch: bool) -> None:
        """Whole blocks are marked, and their space is given back; what is cut at the ends is written."""
        first, stop = -(-offset // BLOCK) * BLOCK, offset + length
        if stop != self.size:
            stop = stop // BLOCK * BLOCK
        if first >= stop:
            self._write_zeroes(offset, length)
            return
        self._write_zeroes(offset, first - offset)
        self._write_zeroes(stop, offset + length - stop)
        if punch:
            self._punch(first, stop - first)
            self._scratch.set_state(first, stop - first, CLEAR)
        else:
            self._write_zeroes(first, stop - first)

    def _punch(self, offset: int, length: int) -> None:
        try:
            files.punch_hole(self._scratch.fd, offset, length)
        except OSError as error:
            if error.errno not in (ENOTSUP, EOPNOTSUPP):
                raise
            self._store(memoryview(bytes(length)), offset)

    def _write_zeroes(self, offset: int, length: int) -> None:
        if length:
            self._fetch_edges(offset, length)
            self._store(memoryview(bytes(length)), offset)
            self._scratch.set_state(offset, length, HERE)

    def cache(self, offset: int, length: int) -> None:
        self._base.cache(offset, length)

    # -- status -------------------------------------------------------------------------------------

    def contexts(self) -> Sequence[str]:
        return self._base.contexts()

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """As the backup's where nothing was written; what was written counts as changed in the dirty bitmap."""
        length = min(length, 1 << 30)
        status = Status(offset, length)
        for start, count, state in self._scratch.runs(offset, length):
            if state == BASE:
                complete = not self._base_status(status, context, start, count)
            elif context != BASE_ALLOCATION:
                complete = not status.add(start + count, 1)
            else:
                complete = not status.add(start + count, NBD_STATE_HOLE | NBD_STATE_ZERO if state == CLEAR else 0)
            if complete:
                break
        return status.extents

    def _base_status(self, status: Status, context: str, offset: int, length: int) -> bool:
        for count, flags in self._base.block_status(context, offset, length):
            offset += count
            length -= count
            if not status.add(offset, flags):
                return False
        return not length  # the backup may say less than it was asked about


def _cut_blocks(offset: int, length: int, size: int) -> Iterator[int]:
    """Numbers of the blocks that a range covers in part. The last block ends with the export."""
    end = offset + length
    if offset % BLOCK:
        yield offset >> BLOCK_SHIFT
    if end % BLOCK and end != size:
        yield end >> BLOCK_SHIFT
