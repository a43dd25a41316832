# SPDX-License-Identifier: Apache-2.0
"""What lies on a block device: the file systems that must rest for a copy of it, and in which order.

Above a device are its partitions, what sysfs lists as holders (device mapper, md, bcache), loop devices over it, and
loop devices over files in a file system that lies on any of these. A file system is frozen before the one below it,
since it writes to that one until it rests: order is by the longest way up, highest first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from stasis.errors import BusyError
from stasis.linux import blockdev, loop, mountns, mounts
from stasis.linux.mountns import NamespaceMount
from stasis.linux.mounts import unescape

__all__ = ["FileSystem", "Stack"]

HIGHEST = 64  # more than any stack of devices; ends the search if sysfs ever shows a ring
LIVES_ON_SEVERAL = Path("/sys/fs/btrfs")


@dataclass(frozen=True)
class FileSystem:
    """A mounted file system: fd is open on it, device is the st_dev of its superblock, level its height above the
    devices that are copied."""

    target: str
    fstype: str
    read_only: bool
    device: int
    level: int
    fd: int = field(compare=False)


class Stack:
    """Everything above some block devices at this moment; a context manager that closes the file systems."""

    def __init__(self, devices: Iterable[int]) -> None:
        """devices: numbers (st_rdev). Raises BusyError for a mounted file system that cannot be reached."""
        self._devices = list(devices)
        self._sight = _Sight()
        self.levels, systems = self._sight.climb(self._devices)
        self._systems = frozenset(systems)
        self.file_systems: list[FileSystem] = []
        try:
            for device, level in sorted(systems.items(), key=lambda entry: -entry[1]):
                self.file_systems.append(self._open(device, level))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file systems."""
        while self.file_systems:
            os.close(self.file_systems.pop().fd)

    @property
    def bare(self) -> list[int]:
        """The devices that have nothing above them: programs use them without a file system, or nobody does."""
        return [device for device in self.levels
                if not self._sight.upper_devices(device) and not self._sight.mounted_on(device)]

    def systems_above(self, device: int) -> frozenset[int]:
        """The file systems, by the number of their superblock, that lie on one of the devices, others left aside."""
        return frozenset(self._sight.climb([device])[1])

    def holds(self, path: str) -> FileSystem | None:
        """The file system of the stack that a path lies on (the nearest parent that exists); None if none does.

        What is written to an overlay goes to its upper directory. One that was mounted before the root was changed is
        named by a path that leads elsewhere now, maybe into the overlay itself.
        """
        here, seen = mount_below(path, self._sight.mounts), set[int]()
        while here is not None and here.device not in seen and (upper := _upper_directory(here)):
            seen.add(here.device)
            here = mount_below(upper, self._sight.mounts)
        return next((one for one in self.file_systems if here is not None and one.device == here.device), None)

    @property
    def swaps(self) -> list[str]:
        """What lies there and is used as swap: the kernel writes to it while file systems are frozen."""
        return [path for path in mounts.swaps()
                if _block_number(path) in self.levels or (_block_number(path) is None and self.holds(path))]

    def is_current(self) -> bool:
        """Whether the same file systems are still mounted."""
        self._sight = _Sight()
        return self._systems == self._sight.climb(self._devices)[1].keys()

    def _open(self, device: int, level: int) -> FileSystem:
        """Open a file system by the first of its mounts that can be reached."""
        shown = [mount for mount in self._sight.mounts if mount.device == device]
        for mount in shown:
            try:
                fd = mountns.open_mount(mount)
            except OSError:
                continue
            return FileSystem(mount.target, mount.fstype, mount.read_only, device, level, fd)
        where = f"{shown[0].target} of process {shown[0].pid}"
        raise BusyError(f"the file system on {shown[0].source} is mounted on {where}, where it cannot be reached",
                        hint="another mount hides it; unmount that, or mount the file system somewhere else too")


class _Sight:
    """One look at mounts, loop devices and what sysfs shows: each is asked for once, however long the way up is."""

    def __init__(self) -> None:
        self.mounts = mountns.all_mounts()
        loops = list(_loops())
        self._over_devices = [(node, number) for node, backing in loops
                              if (number := _block_number(backing)) is not None]
        self._over_files = [(node, below) for node, backing in loops if _block_number(backing) is None
                            and (below := _below_file(node, backing, self.mounts)) is not None]
        self._upper: dict[int, list[int]] = {}
        self._mounted: dict[int, set[int]] = {}

    def climb(self, devices: Iterable[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Levels of all block devices above some, which have level 0, and of the file systems on any of these.

        The longest way counts: raise levels until nothing changes.
        """
        levels: dict[int, int] = dict.fromkeys(devices, 0)
        systems: dict[int, int] = {}
        for _ in range(HIGHEST):
            before = dict(levels), dict(systems)
            for device, level in list(levels.items()):
                for upper in self.upper_devices(device):
                    _raise(levels, upper, level + 1)
                for mounted in self.mounted_on(device):
                    _raise(systems, mounted, level + 1)
            for node, below in self._over_files:
                if below in systems:
                    _raise(levels, node, systems[below] + 1)
            if before == (levels, systems):
                break
        return levels, systems

    def upper_devices(self, device: int) -> list[int]:
        """Partitions, holders, and loop devices over the device itself."""
        if device not in self._upper:
            over = [node for node, below in self._over_devices if below == device]
            self._upper[device] = [*_parts_and_holders(device), *over]
        return self._upper[device]

    def mounted_on(self, device: int) -> set[int]:
        """Superblocks on a block device: by number, by source (btrfs has a number of its own), by btrfs's own list."""
        if device not in self._mounted:
            found = {mount.device for mount in self.mounts if mount.device == device}
            shown = [mount for mount in self.mounts if mount.fstype == "btrfs"]
            family = _btrfs_family(device) if shown else set()
            ours = {source for source in {mount.source for mount in shown} if _block_number(source) in family}
            self._mounted[device] = found | {mount.device for mount in shown if mount.source in ours}
        return self._mounted[device]


def _raise(levels: dict[int, int], key: int, level: int) -> None:
    if level <= HIGHEST:
        levels[key] = max(levels.get(key, 0), level)


def mount_below(path: str, known: Sequence[NamespaceMount]) -> NamespaceMount | None:
    """The mount of our own namespace that a path, or its nearest parent that exists, lies on."""
    where = os.path.abspath(path)
    while not os.path.lexists(where) and where != "/":
        where = os.path.dirname(where)
    try:
        fd = os.open(where, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        number = mountns.mount_id(fd)
    finally:
        os.close(fd)
    return next((mount for mount in known if mount.mount_id == number), None)


def _below_file(node: int, backing: str, known: Sequence[NamespaceMount]) -> int | None:
    """The superblock of the file behind a loop device; None if none of the mounts has it.

    Its path may mean nothing here, as it was opened in another mount namespace or deleted since: the device is asked.
    """
    here = mount_below(backing, known)
    if os.path.lexists(backing):
        return None if here is None else here.device
    path = blockdev.node(node)
    try:
        device = loop.file_system_of(path) if path else None
    except OSError:
        return None  # taken off in between
    if device in {mount.device for mount in known}:
        return device
    # Files on btrfs have a number of their subvolume, which no mount shows: the path is all there is.
    return here.device if here is not None and here.fstype == "btrfs" else None


def _upper_directory(mount: NamespaceMount) -> str:
    """Where an overlay puts what is written to it; empty for other file systems."""
    if mount.fstype != "overlay":
        return ""
    options = (option.partition("=") for option in mount.shared_options.split(","))
    return next((unescape(value) for name, _, value in options if name == "upperdir"), "")


def _parts_and_holders(device: int) -> Iterator[int]:
    directory = blockdev.sysfs_path(device)
    if not (directory / "partition").exists():
        yield from mounts.relatives(device)
    for name in _listed(directory / "holders"):
        number = _number_in(directory / "holders" / name)
        if number is not None:
            yield number


def _loops() -> Iterator[tuple[int, str]]:
    """(number, path of the backing file or device) of each loop device in use, and of its partitions."""
    directory = Path("/sys/block")
    for name in _listed(directory):
        if not name.startswith("loop"):
            continue
        try:
            backing = (directory / name / "loop/backing_file").read_text(errors="surrogateescape").removesuffix("\n")
        except OSError:
            continue  # not in use, or taken off in between
        number = _number_in(directory / name)
        if number is not None:
            yield number, backing
            yield from ((part, backing) for part in mounts.relatives(number))


def _listed(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _btrfs_family(device: int) -> set[int]:
    """The device, and those that share a mounted btrfs with it (/sys/fs/btrfs/UUID/devices)."""
    family = {device}
    for devices in LIVES_ON_SEVERAL.glob("*/devices"):
        members = {number for entry in devices.iterdir() if (number := _number_in(entry)) is not None}
        if device in members:
            family |= members
    return family


def _number_in(directory: Path) -> int | None:
    try:
        major, minor = (directory / "dev").read_text().split(":")
    except (OSError, ValueError):
        return None
    return os.makedev(int(major), int(minor))


def _block_number(path: str) -> int | None:
    """The device number of a block device node; None for anything else."""
    if not path.startswith("/"):
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None
