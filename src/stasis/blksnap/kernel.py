# SPDX-License-Identifier: Apache-2.0
"""The few calls through which kernel modules are driven; a test puts a kernel of its own in their place."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from stasis.linux import blockdev, ioctl, mounts

__all__ = ["Kernel"]


class Kernel:
    """The running kernel. Every method raises OSError."""

    dev = Path("/dev")
    """Where control nodes and disks have their nodes."""

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[int]:
        """A descriptor of a device node, for reading: all that these modules ask for."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def ioctl(self, fd: int, name: str, request: int, argument: ctypes.Structure) -> int:
        """Issue a request and give what it returned; the structure is filled in place."""
        return ioctl.call(fd, name, request, argument)

    def number(self, path: str) -> tuple[int, int] | None:
        """Major and minor number of a block device; None for any other file."""
        status = os.stat(path)
        if not stat.S_ISBLK(status.st_mode):
            return None
        return os.major(status.st_rdev), os.minor(status.st_rdev)

    def size(self, path: str) -> int:
        """Size of a block device in bytes."""
        with self.open(path) as fd:
            return blockdev.size(fd)

    def node(self, major: int, minor: int) -> str:
        """Path of the node of a block device. FileNotFoundError if the kernel has no such device."""
        name = blockdev.sysfs_path(os.makedev(major, minor)).resolve(strict=True).name
        return str(self.dev / name.replace("!", "/"))

    def mount_point(self, path: str) -> str | None:
        """Where the file system on a block device is mounted for writing; None if it is not."""
        number = os.stat(path).st_rdev
        return next((mount.target for mount in mounts.mounts_of(number) if not mount.read_only), None)

    def discarded(self, path: str) -> int | None:
        """Sectors of a block device that were discarded since it appeared; None if that is not counted."""
        with self.open(path) as fd:
            return blockdev.discarded_sectors(fd)
