# SPDX-License-Identifier: Apache-2.0
"""Where a file lies: on which device and in which sectors of it, for `markdirtyblock --file`.

A place that is not certain is refused. To mark the wrong blocks would be to miss the right ones.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stasis.blksnap.console.numbers import SECTOR
from stasis.cli.blksnap.session import Session, failing
from stasis.errors import NotFoundError, StasisError, UsageError
from stasis.linux import blockdev, fiemap, ioctl

if TYPE_CHECKING:
    from stasis.daemon.model import Device

__all__ = ["Location", "device_below", "of_file"]

NO_PLACE = (
    fiemap.FIEMAP_EXTENT_UNKNOWN
    | fiemap.FIEMAP_EXTENT_DELALLOC
    | fiemap.FIEMAP_EXTENT_ENCODED
    | fiemap.FIEMAP_EXTENT_NOT_ALIGNED
    | fiemap.FIEMAP_EXTENT_DATA_INLINE
    | fiemap.FIEMAP_EXTENT_DATA_TAIL
)
"""Flags of extents whose address is none, or not that of whole blocks of this file."""

# include/uapi/linux/fs.h: struct fsxattr begins with fsx_xflags.
FSXATTR_SIZE = 28
FS_IOC_FSGETXATTR = ioctl.IOR("X", 31, FSXATTR_SIZE)
FS_XFLAG_REALTIME = 1


@dataclass(frozen=True)
class Location:
    """The block device number that the file's file system shows, and (sector, count) on it."""

    number: int
    ranges: list[tuple[int, int]]

    @property
    def node(self) -> str:
        """The device as the tool writes it."""
        return f"/dev/block/{os.major(self.number)}:{os.minor(self.number)}"


def of_file(path: str) -> Location:
    """Where a file lies. Raises StasisError with the tool's sentences."""
    with failing("Failed to get file size."):
        number = os.stat(path).st_dev
    with failing("Failed to open file."):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with failing("Failed to call FS_IOC_FIEMAP."):
            _refuse_other_device(fd, path)
            found = list(fiemap.extents(fd, flags=fiemap.FIEMAP_FLAG_SYNC))
    finally:
        os.close(fd)
    with failing("File location is not ordered by sector size."):
        return Location(number, [_in_sectors(extent, path) for extent in found])


def _refuse_other_device(fd: int, path: str) -> None:
    """A file on the realtime device of an XFS tells addresses of a device that nothing names."""
    flags = bytearray(FSXATTR_SIZE)
    try:
        ioctl.call(fd, "FS_IOC_FSGETXATTR", FS_IOC_FSGETXATTR, flags)
    except OSError:
        return  # a file system without such attributes has no such device
    if int.from_bytes(flags[:4], "little") & FS_XFLAG_REALTIME:
        raise StasisError(f"{path} lies on the realtime device of its file system", errno=errno.EOPNOTSUPP)


def _in_sectors(extent: fiemap.FileExtent, path: str) -> tuple[int, int]:
    if extent.flags & NO_PLACE or extent.physical % SECTOR or extent.length % SECTOR:
        raise UsageError(f"{path} has an extent without a place of its own", hint="mark ranges by --ranges")
    return extent.physical // SECTOR, extent.length // SECTOR


def device_below(session: Session, found: Location) -> tuple[Device, int]:
    """The attached device that the file lies on, and the sector of it at which the file's device begins.

    The file system may be on a partition of a device's node. NotFoundError if nothing attached is below.
    """
    numbers = _number_and_start(found.number)
    for device in session.client.devices():
        for path in (device.node, device.path):
            start = numbers.get(_block_number(path))
            if start is not None:
                return device, start
    raise NotFoundError(f"the device {found.node} is not attached")


def _number_and_start(number: int) -> dict[int | None, int]:
    """The device and, of a partition, its disk; each with the sector at which the device begins on it."""
    starts: dict[int | None, int] = {number: 0}
    directory = blockdev.sysfs_path(number)
    if (directory / "partition").exists():
        major, minor = (directory.resolve().parent / "dev").read_text().split(":")
        starts[os.makedev(int(major), int(minor))] = int((directory / "start").read_text())
    return starts


def _block_number(path: str | None) -> int | None:
    try:
        status = os.stat(path or "")
    except OSError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None
