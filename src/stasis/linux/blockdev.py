# SPDX-License-Identifier: Apache-2.0
"""Block device ioctls (include/uapi/linux/fs.h) and what /sys/dev/block says about a device."""

import os
import stat
import struct
from pathlib import Path

from stasis.linux import ioctl

__all__ = [
    "discard",
    "discarded_sectors",
    "disk_sequence",
    "is_block_device",
    "is_read_only",
    "logical_block_size",
    "minimum_io_size",
    "node",
    "physical_block_size",
    "reread_partitions",
    "size",
    "sysfs_path",
    "write_counters",
    "zero_out",
]

BLKROGET = ioctl.IO(0x12, 94)
BLKRRPART = ioctl.IO(0x12, 95)
BLKSSZGET = ioctl.IO(0x12, 104)
# The header says size_t here, but the kernel fills 64 bits on every architecture.
BLKGETSIZE64 = ioctl.IOR(0x12, 114, 8)
BLKDISCARD = ioctl.IO(0x12, 119)
BLKIOMIN = ioctl.IO(0x12, 120)
BLKPBSZGET = ioctl.IO(0x12, 123)
BLKZEROOUT = ioctl.IO(0x12, 127)
BLKGETDISKSEQ = ioctl.IOR(0x12, 128, 8)

SYSFS = Path("/sys/dev/block")

RANGE = struct.Struct("QQ")  # uint64_t range[2]: offset, length in bytes

# Documentation/block/stat.rst: 0-based fields of /sys/dev/block/*/stat. Sectors are of 512 bytes.
STAT_WRITE_IOS = 4
STAT_WRITE_SECTORS = 6
STAT_DISCARD_IOS = 11
STAT_DISCARD_SECTORS = 13


def is_block_device(fd: int) -> bool:
    """Whether fd is open on a block device."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def size(fd: int) -> int:
    """Size in bytes of a block device, or of a regular file."""
    if is_block_device(fd):
        return ioctl.get(fd, "BLKGETSIZE64", BLKGETSIZE64, 8)
    return os.fstat(fd).st_size


def logical_block_size(fd: int) -> int:
    """Smallest unit of direct I/O in bytes."""
    return ioctl.get(fd, "BLKSSZGET", BLKSSZGET, 4)


def physical_block_size(fd: int) -> int:
    """Bytes that the medium writes without a read before."""
    return ioctl.get(fd, "BLKPBSZGET", BLKPBSZGET, 4)


def minimum_io_size(fd: int) -> int:
    """Smallest I/O in bytes that the device likes (a RAID's chunk, for instance)."""
    return ioctl.get(fd, "BLKIOMIN", BLKIOMIN, 4)


def is_read_only(fd: int) -> bool:
    """Whether the device itself is set read-only."""
    return ioctl.get(fd, "BLKROGET", BLKROGET, 4) != 0


def discard(fd: int, offset: int, length: int) -> None:
    """Discard length bytes at offset; both multiples of the logical block size. EOPNOTSUPP if it cannot."""
    ioctl.call(fd, "BLKDISCARD", BLKDISCARD, bytearray(RANGE.pack(offset, length)))


def zero_out(fd: int, offset: int, length: int) -> None:
    """Write zeroes to length bytes at offset, offloaded where possible; block multiples as discard."""
    ioctl.call(fd, "BLKZEROOUT", BLKZEROOUT, bytearray(RANGE.pack(offset, length)))


def reread_partitions(fd: int) -> None:
    """Have the kernel read the partition table again. EBUSY while a partition is in use."""
    ioctl.call(fd, "BLKRRPART", BLKRRPART)


def disk_sequence(fd: int) -> int | None:
    """Number that no other disk of this boot has had, even at the same place; None before Linux 5.15."""
    try:
        return ioctl.get(fd, "BLKGETDISKSEQ", BLKGETDISKSEQ, 8)
    except OSError:
        return None


def sysfs_path(rdev: int) -> Path:
    """The directory of a device number (st_rdev) in sysfs; it need not exist."""
    return SYSFS / f"{os.major(rdev)}:{os.minor(rdev)}"


def node(rdev: int) -> str | None:
    """A path in /dev of a device number: by the kernel's name for it, as /dev/block is udev's; None without."""
    try:
        lines = (sysfs_path(rdev) / "uevent").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition("=")
        if name == "DEVNAME" and os.path.exists(path := f"/dev/{value}") and os.stat(path).st_rdev == rdev:
            return path
    return None


def write_counters(fd: int) -> tuple[int, int] | None:
    """(I/Os, 512-byte sectors) of all writes and discards since the device appeared; None if not counted.

    For a partition these are the partition's own. A write to the whole disk is not in them.
    """
    fields = _statistics(fd)
    if fields is None:
        return None
    return (
        fields[STAT_WRITE_IOS] + fields[STAT_DISCARD_IOS],
        fields[STAT_WRITE_SECTORS] + fields[STAT_DISCARD_SECTORS],
    )


def discarded_sectors(fd: int) -> int | None:
    """512-byte sectors that were discarded since the device appeared; None if not counted. As `write_counters`."""
    fields = _statistics(fd)
    return None if fields is None else fields[STAT_DISCARD_SECTORS]


def _statistics(fd: int) -> list[int] | None:
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return None
    try:
        fields = [int(field) for field in (sysfs_path(status.st_rdev) / "stat").read_text().split()]
    except OSError:
        return None
    return fields if len(fields) > STAT_DISCARD_SECTORS else None
