# SPDX-License-Identifier: Apache-2.0
"""Freezing file systems (FIFREEZE and FITHAW, include/uapi/linux/fs.h) and writing them out (syncfs)."""

import errno

from stasis.linux import ioctl, libc

__all__ = ["freeze", "sync", "thaw"]

FIFREEZE = ioctl.IOWR("X", 119, 4)
FITHAW = ioctl.IOWR("X", 120, 4)


def freeze(fd: int) -> None:
    """Bring the file system that fd lies on to rest: writers wait, and all that was written is on the disk.

    EBUSY: it is frozen already. EOPNOTSUPP: it cannot be frozen. EROFS or EINVAL never come for a read-only one: it
    is frozen like any other. Waits for writes that are under way, and no signal ends that wait
    (freeze_super in fs/super.c).
    """
    ioctl.call(fd, "FIFREEZE", FIFREEZE)


def thaw(fd: int) -> bool:
    """Let writers of a frozen file system go on. False if it was not frozen."""
    try:
        ioctl.call(fd, "FITHAW", FITHAW)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def sync(fd: int) -> None:
    """Write out all of the file system that fd lies on (syncfs(2)). Raises OSError of a failed writeback."""
    libc.check(libc.libc.syncfs(fd), "syncfs", fd)
