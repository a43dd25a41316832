# SPDX-License-Identifier: Apache-2.0
"""Memory for I/O: aligned, given back, closed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from stasis.linux.iobuffer import PAGE_SIZE, IoBuffer

MIB = 1 << 20


def _private_bytes(address: int) -> int:
    """Memory behind the mapping that begins at `address`, as the kernel counts it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        first, _, last = line.split()[0].partition("-")
        if last and int(first, 16) <= address < int(last, 16):
            dirty = next(entry for entry in lines if entry.startswith("Private_Dirty:"))
            return int(dirty.split()[1]) * 1024
    return 0


def test_address_is_that_of_the_view_and_aligned() -> None:
    with IoBuffer(5000) as buffer:
        assert buffer.size == 2 * PAGE_SIZE == len(buffer.view)
        assert buffer.address % PAGE_SIZE == 0
        buffer.view[5:8] = b"abc"
        assert ctypes.string_at(buffer.address + 5, 3) == b"abc"


def test_release_gives_memory_back_and_zeroes() -> None:
    with IoBuffer(64 * MIB) as buffer:
        buffer.view[:] = b"x" * len(buffer.view)
        full = _private_bytes(buffer.address)
        assert full >= 64 * MIB
        buffer.release_pages()
        assert _private_bytes(buffer.address) <= full - 64 * MIB
        assert buffer.view[:4] == bytes(4)


def test_close_with_a_living_slice_and_twice() -> None:
    buffer = IoBuffer(PAGE_SIZE)
    part = buffer.view[:10]
    buffer.close()
    assert part[0] == 0
    part.release()
    buffer.close()


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_none(size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        IoBuffer(size)
