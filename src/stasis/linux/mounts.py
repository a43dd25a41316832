# SPDX-License-Identifier: Apache-2.0
"""Who uses a block device or a file: mounts, swap, devices stacked on it, loop devices, locks, processes.

These lists are for messages and early refusals. They are a look at one moment; what keeps others out is an
exclusive open.
"""

import ctypes
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stasis.linux import blockdev, libc, process

__all__ = [
    "Mount",
    "file_holders",
    "file_uses",
    "holders_of",
    "lies_on",
    "mounts",
    "mounts_of",
    "relatives",
    "swaps",
    "unescape",
    "unmount",
]

# proc_pid_mountinfo(5): 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
MOUNTINFO_DEVICE = 2
MOUNTINFO_TARGET = 4

# include/linux/fs.h; umount(2)
MNT_DETACH = 2

_umount2 = libc.libc.umount2
_umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True)
class Mount:
    """A mounted file system; read_only tells about the file system, not about this mount of it."""

    source: str
    target: str
    fstype: str
    read_only: bool
    device: int


def unescape(field: str) -> str:
    """Undo the kernel's \\ooo for space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _parse_mount(line: str) -> Mount:
    before, _, behind = line.partition(" - ")
    fields = before.split(" ")
    fstype, source, options = behind.split(" ")[:3]
    major, minor = fields[MOUNTINFO_DEVICE].split(":")
    return Mount(
        source=unescape(source),
        target=unescape(fields[MOUNTINFO_TARGET]),
        fstype=fstype,
        read_only="ro" in options.split(","),
        device=os.makedev(int(major), int(minor)),
    )


def mounts() -> list[Mount]:
    """All mounts of this mount namespace, in mount order."""
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return [_parse_mount(line) for line in text.splitlines()]


def lies_on(path: str, rdev: int) -> bool:
    """Whether a path's mount is one of the block device rdev, as far as its name tells: nothing is looked at there."""
    parts = Path(os.path.abspath(path)).parents
    found = [mount for mount in mounts() if Path(mount.target) in parts]
    deepest = max((len(mount.target) for mount in found), default=0)
    last = [mount for mount in found if len(mount.target) == deepest][-1:]
    return any(mount.device == rdev or _block_number(mount.source) == rdev for mount in last)


def unmount(target: str, *, lazily: bool = False) -> None:
    """Unmount what is mounted on target. EBUSY while it is in use, EINVAL if it is no mount point.

    `lazily` takes it out of sight at once; the file system ends when the last who uses it does.
    """
    libc.check(_umount2(os.fsencode(target), MNT_DETACH if lazily else 0), "umount2", target)


def _block_number(path: str) -> int | None:
    """The device number of a block device node."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


def mounts_of(rdev: int) -> list[Mount]:
    """Mounts of the block device rdev. By source too: btrfs shows an anonymous device number of its own."""
    return [
        mount
        for mount in mounts()
        if mount.device == rdev or (mount.source.startswith("/") and _block_number(mount.source) == rdev)
    ]


def _device_number(directory: Path) -> int | None:
    try:
        major, minor = (directory / "dev").read_text().split(":")
    except OSError:
        return None
    return os.makedev(int(major), int(minor))


def relatives(rdev: int) -> list[int]:
    """Devices that share sectors with rdev: the partitions of a disk, or the disk of a partition."""
    directory = blockdev.sysfs_path(rdev)
    if (directory / "partition").exists():
        found = [_device_number(directory.resolve().parent)]
    else:
        found = [_device_number(directory / name) for name in _partitions(directory)]
    return [number for number in found if number is not None]


def _partitions(directory: Path) -> list[str]:
    try:
        return [name for name in sorted(os.listdir(directory)) if os.path.exists(f"{directory}/{name}/partition")]
    except OSError:
        return []


def _node(rdev: int) -> str:
    """/dev name of a device number, as the kernel calls it."""
    try:
        return f"/dev/{blockdev.sysfs_path(rdev).resolve(strict=True).name}"
    except OSError:
        return f"block device {os.major(rdev)}:{os.minor(rdev)}"


def holders_of(rdev: int, skip: Iterable[int] = ()) -> list[str]:
    """What uses the block device rdev or a device that shares sectors with it, as phrases for messages.

    Processes are "name (pid N)"; this process and those in skip are left out. Empty: nothing that we can see.
    """
    numbers = [rdev, *relatives(rdev)]
    found: list[str] = []
    for number in numbers:
        suffix = "" if number == rdev else f" ({_node(number)})"
        found += [phrase + suffix for phrase in _kernel_users(number)]
    for pid in _processes(skip):
        if any(process.has_open(pid, rdev=number) for number in numbers):
            found.append(f"{process.name(pid)} (pid {pid})")
    return list(dict.fromkeys(found))


def _kernel_users(rdev: int) -> Iterator[str]:
    for mount in mounts_of(rdev):
        yield f"mounted on {mount.target}" + (" (read-only)" if mount.read_only else "")
    yield from ("used as swap" for path in swaps() if _block_number(path) == rdev)
    yield from _stacked(rdev)
    for loop in _loops():
        if _block_number(loop.backing) == rdev:
            yield f"backing file of {loop.node}"


def swaps() -> list[str]:
    """Files and block devices that are used as swap (proc_swaps(5))."""
    return [unescape(line.split()[0]) for line in _lines("/proc/swaps")[1:]]


def _stacked(rdev: int) -> Iterator[str]:
    """Device-mapper, LVM, md, bcache: what sysfs lists as holders."""
    directory = blockdev.sysfs_path(rdev) / "holders"
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for name in names:
        mapped = _lines(str(directory / name / "dm" / "name"))
        uuid = "".join(_lines(str(directory / name / "dm" / "uuid")))
        kind = "LVM volume" if uuid.startswith("LVM-") else "device"
        yield f"part of {kind} {mapped[0]} ({name})" if mapped else f"part of {name}"


def file_holders(path: str, skip: Iterable[int] = ()) -> list[str]:
    """Everything that uses a regular file: loop devices, swap, locks, open descriptors. As holders_of."""
    status = os.stat(path)
    inode = (status.st_dev, status.st_ino)
    found = file_uses(path)
    lockers = _lockers(inode)
    for pid in _processes(skip):
        if pid in lockers:
            found.append(f"locked by {process.name(pid)} (pid {pid})")
        elif process.has_open(pid, inode=inode):
            found.append(f"{process.name(pid)} (pid {pid})")
    return found


def file_uses(path: str) -> list[str]:
    """What the kernel uses a regular file for: loop devices and swap, as phrases for messages."""
    inode = _inode(path)
    found = [f"backing file of {loop.node}" for loop in _loops() if _inode(loop.backing) == inode]
    found += ["used as swap" for path in swaps() if _inode(path) == inode]
    return found


def _processes(skip: Iterable[int]) -> list[int]:
    return sorted(set(process.processes()) - {os.getpid(), *skip})


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino)


def _lockers(inode: tuple[int, int]) -> set[int]:
    """Pids in /proc/locks. A line: "1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF", the device in hex."""
    found = set()
    for line in _lines("/proc/locks"):
        fields = line.replace("->", "").split()
        major, minor, number = fields[5].split(":")
        if (os.makedev(int(major, 16), int(minor, 16)), int(number)) == inode:
            found.add(int(fields[4]))
    return found


@dataclass(frozen=True)
class _Loop:
    node: str
    backing: str


def _loops() -> Iterator[_Loop]:
    for path in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        lines = _lines(str(path))
        if lines:
            yield _Loop(f"/dev/{path.parts[3]}", lines[0])


def _lines(path: str) -> list[str]:
    """The lines of a file in /proc or /sys; none if it is not there (any more)."""
    try:
        return Path(path).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
