# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2) as a means to learn which pages are written: asynchronous write protection (Linux 6.7).

Before, it protects pages for a moment: whoever writes waits until they are let go (`hold`). And at all times it knows a
mapping again: what is moved, unmapped or mapped anew is not registered any more.

A page that is protected is written without anybody being asked; the kernel takes the mark off, and PAGEMAP_SCAN tells
which pages have lost theirs (`pagemap.py`). A descriptor works on the address space of the process that made it,
whoever calls ioctl(2). When the last one is closed, all marks go.
"""

import errno
import functools
import os
import struct
from collections.abc import Callable

from stasis.linux import ioctl, libc

__all__ = ["UFFD_USER_MODE_ONLY", "enable", "enable_plain", "forget", "has_async", "has_plain", "hold", "register"]

UFFD_USER_MODE_ONLY = 1
"""userfaultfd(2) wants this of those who have no CAP_SYS_PTRACE; it makes no difference to write protection."""

# include/uapi/linux/userfaultfd.h
UFFD_API = 0xAA
FEATURE_PAGEFAULT_FLAG_WP, FEATURE_WP_UNPOPULATED, FEATURE_WP_ASYNC = 1, 1 << 13, 1 << 15
API = struct.Struct("<3Q")  # struct uffdio_api: api, features, ioctls
REGISTER = struct.Struct("<4Q")  # struct uffdio_register: start, length, mode, ioctls
WRITEPROTECT = struct.Struct("<3Q")  # struct uffdio_writeprotect: start, length, mode
MODE_WP = 2
WRITEPROTECT_MODE_WP = 1
SYS_USERFAULTFD = 323
UFFDIO_API = ioctl.IOWR(UFFD_API, 0x3F, API.size)
UFFDIO_REGISTER = ioctl.IOWR(UFFD_API, 0x00, REGISTER.size)
UFFDIO_WRITEPROTECT = ioctl.IOWR(UFFD_API, 0x06, WRITEPROTECT.size)


def enable(fd: int) -> None:
    """Choose asynchronous write protection, once for each descriptor. EINVAL where the kernel lacks it."""
    _enable(fd, FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC, FEATURE_WP_ASYNC)


def enable_plain(fd: int) -> None:
    """Choose write protection that makes writers wait. EINVAL where the kernel lacks it (before Linux 5.7)."""
    _enable(fd, FEATURE_PAGEFAULT_FLAG_WP, FEATURE_PAGEFAULT_FLAG_WP)


def _enable(fd: int, features: int, needed: int) -> None:
    wanted = bytearray(API.pack(UFFD_API, features, 0))
    ioctl.call(fd, "UFFDIO_API", UFFDIO_API, wanted)
    if not API.unpack(wanted)[1] & needed:
        raise libc.error(errno.EINVAL, "UFFDIO_API", fd)


@functools.cache
def has_async() -> bool:
    """Whether this kernel has asynchronous write protection: asked of it with a descriptor of our own."""
    return _accepts(enable)


def has_plain() -> bool:
    """Whether it has write protection at all."""
    return _accepts(enable_plain)


def _accepts(choose: Callable[[int], None]) -> bool:
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY, 0, 0, 0, 0, 0)
    if fd < 0:
        return False
    try:
        choose(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(fd)
    return True


def register(fd: int, start: int, length: int) -> None:
    """Watch a mapping; nothing happens where this descriptor does so already.

    EBUSY where another descriptor does, EINVAL or EPERM for memory of a kind that cannot be watched, ESRCH when the
    address space is gone.
    """
    ioctl.call(fd, "UFFDIO_REGISTER", UFFDIO_REGISTER, bytearray(REGISTER.pack(start, length, MODE_WP, 0)))


def hold(fd: int, start: int, length: int) -> None:
    """Let whoever writes to a page that is there wait until `forget`. For descriptors without asynchronous protection.

    With a descriptor for user mode only, a system call that writes gets EFAULT instead.
    """
    wanted = bytearray(WRITEPROTECT.pack(start, length, WRITEPROTECT_MODE_WP))
    ioctl.call(fd, "UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, wanted)


def forget(fd: int, start: int, length: int) -> None:
    """Take the marks off all pages of a range: all of them count as written. Who waits goes on."""
    ioctl.call(fd, "UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, bytearray(WRITEPROTECT.pack(start, length, 0)))
