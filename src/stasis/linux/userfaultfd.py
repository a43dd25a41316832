# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2) as a means to learn which pages are written: asynchronous write protection (Linux 6.7).

A page that is protected is written without anybody being asked; the kernel takes the mark off, and PAGEMAP_SCAN tells
which pages have lost theirs (`pagemap.py`). A descriptor works on the address space of the process that made it,
whoever calls ioctl(2). When the last one is closed, all marks go.
"""

import struct

from stasis.linux import ioctl, libc

__all__ = ["UFFD_USER_MODE_ONLY", "enable", "forget", "register"]

UFFD_USER_MODE_ONLY = 1
"""userfaultfd(2) wants this of those who have no CAP_SYS_PTRACE; it makes no difference to write protection."""

# include/uapi/linux/userfaultfd.h
UFFD_API = 0xAA
FEATURE_WP_UNPOPULATED, FEATURE_WP_ASYNC = 1 << 13, 1 << 15
API = struct.Struct("<3Q")  # struct uffdio_api: api, features, ioctls
REGISTER = struct.Struct("<4Q")  # struct uffdio_register: start, length, mode, ioctls
WRITEPROTECT = struct.Struct("<3Q")  # struct uffdio_writeprotect: start, length, mode
MODE_WP = 2
UFFDIO_API = ioctl.IOWR(UFFD_API, 0x3F, API.size)
UFFDIO_REGISTER = ioctl.IOWR(UFFD_API, 0x00, REGISTER.size)
UFFDIO_WRITEPROTECT = ioctl.IOWR(UFFD_API, 0x06, WRITEPROTECT.size)


def enable(fd: int) -> None:
    """Choose asynchronous write protection, once for each descriptor. EINVAL where the kernel lacks it."""
    wanted = bytearray(API.pack(UFFD_API, FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC, 0))
    ioctl.call(fd, "UFFDIO_API", UFFDIO_API, wanted)
    if not API.unpack(wanted)[1] & FEATURE_WP_ASYNC:
        raise libc.error(22, "UFFDIO_API", fd)


def register(fd: int, start: int, length: int) -> None:
    """Watch a mapping; nothing happens where this descriptor does so already.

    EBUSY where another descriptor does, EINVAL or EPERM for memory of a kind that cannot be watched, ESRCH when the
    address space is gone.
    """
    ioctl.call(fd, "UFFDIO_REGISTER", UFFDIO_REGISTER, bytearray(REGISTER.pack(start, length, MODE_WP, 0)))


def forget(fd: int, start: int, length: int) -> None:
    """Take the marks off all pages of a range: all of them count as written."""
    ioctl.call(fd, "UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, bytearray(WRITEPROTECT.pack(start, length, 0)))
