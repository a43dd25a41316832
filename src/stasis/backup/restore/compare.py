# SPDX-License-Identifier: Apache-2.0
"""Looking at what a target or a live device holds: read it, find what differs and what is not zero."""

from __future__ import annotations

import os
from collections.abc import Iterator

from stasis.block.copy.plan import Extent
from stasis.linux import files, memory
from stasis.linux.iobuffer import IoBuffer

__all__ = ["PIECE_BYTES", "differing_runs", "nonzero_runs", "read_into"]

# Unit in which differing data is told apart and written. A page: less would be read before it is written.
PAGE_BYTES = 4096
# Most that is read at a time to look for data in what should be zeroes, and the unit in which it is told.
PIECE_BYTES = 1 << 20
ZERO_GRANULE = 64 * 1024


def read_into(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill the view from `offset` of a file. Raises OSError, EIO at the end of the file."""
    files.transfer_rest(os.preadv, descriptor, [view], offset, os.preadv(descriptor, [view], offset))


def differing_runs(left: int, right: int, length: int) -> Iterator[Extent]:
    """(start, length) of the runs of pages in which `length` bytes at two addresses differ."""
    run = 0
    for start in range(0, length, PAGE_BYTES):
        count = min(PAGE_BYTES, length - start)
        if memory.first_difference(left + start, right + start, count) is not None:
            run += count
        elif run:
            yield start - run, run
            run = 0
    if run:
        yield length - run, run


def nonzero_runs(descriptor: int, offset: int, length: int, buffer: IoBuffer, *, sparse: bool) -> Iterator[Extent]:
    """(offset, length) of what is not zero in an extent of a file, in steps of `ZERO_GRANULE`.

    buffer: PIECE_BYTES or more. sparse: the file can tell its holes, which are passed over.
    """
    extents = files.data_extents(descriptor, offset, length) if sparse else iter([(offset, length, True)])
    for start, count, is_data in extents:
        if is_data:
            yield from _nonzero_in(descriptor, start, count, buffer)


def _nonzero_in(descriptor: int, offset: int, length: int, buffer: IoBuffer) -> Iterator[Extent]:
    for start in range(offset, offset + length, PIECE_BYTES):
        count = min(PIECE_BYTES, offset + length - start)
        read_into(descriptor, buffer.view[:count], start)
        if memory.is_zero(buffer.address, count):
            continue
        for granule in range(0, count, ZERO_GRANULE):
            part = min(ZERO_GRANULE, count - granule)
            if not memory.is_zero(buffer.address + granule, part):
                yield start + granule, part
