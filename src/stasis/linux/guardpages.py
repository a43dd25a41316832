# SPDX-License-Identifier: Apache-2.0
"""Guard pages of a task: ranges that madvise(MADV_GUARD_INSTALL) has made deadly (Linux 6.13), told by PAGEMAP_SCAN.

Memory that has or had some carries "gu" in its VmFlags; the scan can tell them since the kernel that shows it.
"""

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator

__all__ = ["guard_pages"]

# include/uapi/linux/fs.h
PAGEMAP_SCAN = 0xC0606610
PAGE_IS_GUARD = 1 << 8
ARGUMENT = struct.Struct("<12Q")
REGION = struct.Struct("<3Q")
REGIONS = 512


def guard_pages(pid: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of them. OSError (EINVAL) on a kernel that cannot tell."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    regions = ctypes.create_string_buffer(REGIONS * REGION.size)
    try:
        while start < end:
            argument = bytearray(ARGUMENT.pack(ARGUMENT.size, 0, start, end, 0, ctypes.addressof(regions), REGIONS, 0,
                                               0, PAGE_IS_GUARD, 0, PAGE_IS_GUARD))  # fmt: skip
            count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
            for number in range(count):
                first, last, _ = REGION.unpack_from(regions, number * REGION.size)
                yield first, last
            start = ARGUMENT.unpack(argument)[4]
    finally:
        os.close(fd)
