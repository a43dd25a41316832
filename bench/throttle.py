# SPDX-License-Identifier: Apache-2.0
"""Slow disks: loop devices that the block cgroup holds to a number of operations and bytes per second.

Reads and writes have a budget each, as in cgroup v2's io.max; a disk that shares one budget is slower for a
reader that writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lab import MIB, Lab, LabError

__all__ = ["IOPS", "RATE", "SlowDisk", "make_slow_directory", "make_slow_disk"]

IOPS = 1000
RATE = 32 * MIB
CGROUP_V1 = Path("/sys/fs/cgroup/blkio")
CGROUP_V2 = Path("/sys/fs/cgroup")
SECTOR = 512


@dataclass(frozen=True, slots=True)
class SlowDisk:
    """A throttled loop device."""

    path: Path

    def counters(self) -> tuple[int, int]:
        """(bytes read, bytes written) since the device was set up (Documentation/block/stat.rst)."""
        fields = (Path("/sys/block") / self.path.name / "stat").read_text().split()
        return int(fields[2]) * SECTOR, int(fields[6]) * SECTOR


def make_slow_disk(lab: Lab, backing: Path) -> SlowDisk:
    """A loop device over a file, throttled until the scope ends. Needs root."""
    device = lab.loop_device(backing)
    number = (Path("/sys/block") / device.name / "dev").read_text().strip()
    _limit(lab, number)
    return SlowDisk(device)


def make_slow_directory(lab: Lab, size: int) -> tuple[SlowDisk, Path]:
    """An ext4 file system on a slow disk, mounted until the scope ends.

    A file and not the bare device, because the throttle counts what is submitted to it, before any merging: a
    block device's page cache is written back in pieces of 4 KiB, a file's in long extents.
    """
    backing = lab.path("storage.img")
    backing.touch()
    os.truncate(backing, size)
    device = lab.loop_device(backing)
    lab.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device])
    directory = lab.directory / "mnt"
    directory.mkdir(exist_ok=True)
    lab.run(["mount", device, directory])
    lab.on_exit(lambda: lab.run(["umount", directory]))
    _limit(lab, (Path("/sys/block") / device.name / "dev").read_text().strip())
    return SlowDisk(device), directory


def _limit(lab: Lab, number: str) -> None:
    if (CGROUP_V1 / "blkio.throttle.write_iops_device").exists():
        _limit_v1(lab, number)
    elif (CGROUP_V2 / "cgroup.controllers").exists():
        _limit_v2(lab, number)
    else:
        raise LabError("no block I/O cgroup on this machine")


def _limit_v1(lab: Lab, number: str) -> None:
    """In the root group: there the kernel's own writeback of buffered data is throttled as well."""
    for kind in ("read", "write"):
        for what, limit in (("iops", IOPS), ("bps", RATE)):
            file = CGROUP_V1 / f"blkio.throttle.{kind}_{what}_device"
            lab.on_exit(partial(file.write_text, f"{number} 0"))
            file.write_text(f"{number} {limit}")


def _limit_v2(lab: Lab, number: str) -> None:
    """In a group of our own, which this process and so all it starts move into."""
    group = CGROUP_V2 / f"stasis-bench-{os.getpid()}"
    if not group.exists():
        (CGROUP_V2 / "cgroup.subtree_control").write_text("+io")
        group.mkdir()
        before = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        lab.on_exit(group.rmdir)
        lab.on_exit(lambda: (CGROUP_V2 / before / "cgroup.procs").write_text(str(os.getpid())))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    lab.on_exit(lambda: (group / "io.max").write_text(f"{number} riops=max wiops=max rbps=max wbps=max"))
    (group / "io.max").write_text(f"{number} riops={IOPS} wiops={IOPS} rbps={RATE} wbps={RATE}")
