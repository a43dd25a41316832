# SPDX-License-Identifier: Apache-2.0
"""Which device a path leads to, and what tells it from another one that takes its place."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from stasis.errors import NotFoundError, PermissionDeniedError, StasisError, UnsupportedError, UsageError
from stasis.linux import blockdev, devmapper

__all__ = ["Identity", "identify", "read_activity", "read_counters", "takes_bios"]

SECTOR = 512
DEEPEST = 8
TOTALS = (0, 1, 2, 4, 5, 6, 11, 12, 13)
"""Documentation/block/stat.rst: requests, merges and sectors read, written and discarded. Times would wrap."""

LOOP_OFFSET = "loop offset "

BIO_DRIVERS = ("dm-", "md", "zram", "ram", "pmem", "brd")
"""Drivers that take bios and are known to show block_bio_complete, or to lose only its precision."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A block device of this boot; start and size in bytes, the start from the beginning of its disk."""

    path: str
    name: str
    major: int
    minor: int
    disk_major: int
    disk_minor: int
    sequence: int
    """Disk sequence number, which no other disk of this boot has had; 0 if the kernel has none."""
    start: int
    size: int
    table: str = ""
    """What the contents of a device-mapper or loop device are made of; empty for others, and in older records."""

    @property
    def rdev(self) -> int:
        """Device number as stat(2) has it."""
        return os.makedev(self.major, self.minor)

    @property
    def disk(self) -> int:
        """Device number of the whole disk as the kernel keeps it: major << 20 | minor."""
        return self.disk_major << 20 | self.disk_minor

    def difference(self, other: Identity) -> str:
        """What tells another device, or this one later, apart; empty if nothing does."""
        if (self.major, self.minor) != (other.major, other.minor):
            return f"it is device {other.major}:{other.minor} now"
        if self.sequence != other.sequence:
            return "another disk took its place"
        if self.size != other.size:
            return f"its size changed from {self.size} to {other.size} bytes"
        if self.start != other.start:
            return "the partition was moved"
        if self.table and self.table != other.table:
            loop = self.table.startswith(LOOP_OFFSET)
            return "it shows another part of its file" if loop else "its device-mapper table was replaced"
        return ""


def identify(path: str) -> Identity:
    """The device behind a path (links are followed).

    NotFoundError, UsageError if it is no block device or has no size, PermissionDeniedError.
    """
    real = os.path.realpath(path)
    try:
        fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise _denied(path) from error
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no device {path}", hint="lsblk shows the devices") from error
    except OSError as error:
        raise NotFoundError(f"{path} cannot be opened: {error.strerror}", errno=error.errno or 0,
                            hint="the device is gone, or has no medium") from error
    try:
        return _identity(path, real, fd)
    except OSError as error:
        if not blockdev.SYSFS.is_dir():
            raise UnsupportedError(f"nothing is known of {path}: there is no {blockdev.SYSFS}",
                                   hint="mount sysfs on /sys, or run this outside of the container") from error
        raise StasisError(f"{path} vanished: {error.strerror}", errno=error.errno or 0,
                          hint="attach it again") from error
    finally:
        os.close(fd)


def _denied(path: str) -> PermissionDeniedError:
    if os.geteuid():
        return PermissionDeniedError(f"{path} cannot be opened by this user", hint="use sudo")
    return PermissionDeniedError(f"{path} cannot be opened, not even by root",
                                 hint="a container's device rules or a security module forbid it; run this outside")


def _identity(path: str, real: str, fd: int) -> Identity:
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        raise UsageError(f"{path} is no block device", hint="an image file can be served: stasis device attach")
    size = blockdev.size(fd)
    if not size:
        raise UsageError(f"{path} has no size: nothing is behind it", hint="losetup -a shows the loop devices")
    directory = blockdev.sysfs_path(status.st_rdev).resolve()
    is_partition = (directory / "partition").exists()
    disk = directory.parent if is_partition else directory
    disk_major, disk_minor = (int(number) for number in (disk / "dev").read_text().split(":"))
    start = int((directory / "start").read_text()) * SECTOR if is_partition else 0
    return Identity(real, directory.name.replace("!", "-"), os.major(status.st_rdev), os.minor(status.st_rdev),
                    disk_major, disk_minor, blockdev.disk_sequence(fd) or 0, start, size,
                    _loop_offset(disk) or _table(disk_major, disk_minor))


def _loop_offset(disk: Path) -> str:
    """Where in its file a loop device begins: LOOP_SET_STATUS64 moves that, and no number of the disk tells. What is
    put in the place of the file is another disk (LOOP_CHANGE_FD raises the disk sequence number)."""
    try:
        return LOOP_OFFSET + (disk / "loop" / "offset").read_text().strip()
    except OSError:
        return ""


def _table(major: int, minor: int) -> str:
    """A digest of what device-mapper makes the device of: it may have an encrypted disk's key in it."""
    if not devmapper.is_mapped(major, minor):
        return ""
    return hashlib.sha256(repr(_plain_table(major, minor)).encode()).hexdigest()


def _plain_table(major: int, minor: int, depth: int = 0) -> list[devmapper.Target]:
    """The table, without the layer that keeps old data for snapshots: that comes and goes with them."""
    found = devmapper.table(major, minor)
    if len(found) == 1 and found[0][2] == "snapshot-origin" and depth < DEEPEST:
        below, _, minor_below = found[0][3].split()[0].partition(":")
        return _plain_table(int(below), int(minor_below), depth + 1)
    return found


def disk_directory(identity: Identity) -> Path:
    """The whole disk in sysfs."""
    return blockdev.sysfs_path(os.makedev(identity.disk_major, identity.disk_minor)).resolve()


def takes_bios(identity: Identity) -> bool:
    """Whether the driver takes bios, so that no request tells of a completion.

    UnsupportedError for a disk whose writes cannot all be seen: one with direct access (DAX), and those whose driver
    hands its bios on without a trace.
    """
    directory = disk_directory(identity)
    if _flag(directory / "queue" / "dax"):
        raise UnsupportedError(f"{identity.path} can be written past the block layer (DAX)",
                               hint="ndctl create-namespace --mode=sector makes it a plain disk")
    if (directory / "mq").exists():
        return False
    if not directory.name.startswith(BIO_DRIVERS):
        raise UnsupportedError(f"{identity.path} is of a kind that tracking does not know ({directory.name})",
                               hint="disks, partitions, loop, dm, md and zram devices can be tracked")
    return True


def _flag(path: Path) -> bool:
    try:
        return path.read_text().strip() == "1"
    except OSError:
        return False


def read_counters(identity: Identity) -> int:
    """Sectors written and discarded since the device appeared; -1 if the kernel does not count them."""
    try:
        fields = [int(field) for field in (blockdev.sysfs_path(identity.rdev) / "stat").read_text().split()]
    except OSError:
        return -1
    if len(fields) <= blockdev.STAT_DISCARD_SECTORS:
        return -1
    return fields[blockdev.STAT_WRITE_SECTORS] + fields[blockdev.STAT_DISCARD_SECTORS]


def read_activity(identity: Identity) -> int:
    """The sum of what the kernel counts of the disk: it only grows until the disk is set up anew. -1 if unknown."""
    try:
        fields = [int(field) for field in (disk_directory(identity) / "stat").read_text().split()]
    except OSError:
        return -1
    return sum(fields[place] for place in TOTALS if place < len(fields))


def writes_in_progress(identity: Identity) -> int:
    """Writes that the disk has begun and not ended."""
    try:
        return int((disk_directory(identity) / "inflight").read_text().split()[1])
    except (OSError, IndexError):
        return 0
