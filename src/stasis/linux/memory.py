# SPDX-License-Identifier: Apache-2.0
"""Comparing plain memory at the speed of libc's memcmp.

Python compares two memoryviews element by element (0.5 ms per MiB and more) and copies to make bytes of them;
memcmp on addresses needs neither, and releases the interpreter lock while it runs.
"""

import ctypes

from stasis.linux import libc

__all__ = ["are_equal", "first_difference", "is_zero", "view_at"]

_memcmp = libc.libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


def is_zero(address: int, length: int) -> bool:
    """Whether length bytes at address are all zero; other data is mostly told by its first byte."""
    if not length:
        return True
    # A range that equals itself moved by one byte consists of copies of its first byte.
    return ctypes.string_at(address, 1) == b"\0" and not _memcmp(address, address + 1, length - 1)


def are_equal(left: int, right: int, length: int) -> bool:
    """Whether length bytes at two addresses are the same."""
    return not _memcmp(left, right, length)


def first_difference(left: int, right: int, length: int) -> int | None:
    """Index of the first byte in which length bytes at two addresses differ; None if they are equal."""
    if not _memcmp(left, right, length):
        return None
    start = 0
    while length > 1:
        half = length // 2
        if _memcmp(left + start, right + start, half):
            length = half
        else:
            start, length = start + half, length - half
    return start


def view_at(address: int, length: int) -> memoryview:
    """length bytes of memory at address, writable. The memory must stay mapped while the view is in use."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
