# SPDX-License-Identifier: Apache-2.0
"""Limits of cgroups on block devices: io.max and io.stat (Documentation/admin-guide/cgroup-v2.rst, IO)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stasis.linux import blockdev, mounts

__all__ = ["cgroups", "limit_line", "root", "whole_disk", "written"]

UNLIMITED = "rbps=max wbps=max riops=max wiops=max"


def root() -> Path | None:
    """Where the second version of cgroups is mounted; None if it is not."""
    return next((Path(mount.target) for mount in mounts.mounts() if mount.fstype == "cgroup2"), None)


def cgroups(top: Path) -> Iterator[Path]:
    """Directories of the cgroups that have limits of their own."""
    return (path.parent for path in sorted(top.rglob("io.max")))


def whole_disk(rdev: int) -> int:
    """The number of the disk of a partition, or rdev itself: limits are on disks."""
    directory = blockdev.sysfs_path(rdev)
    if not (directory / "partition").exists():
        return rdev
    major, minor = (directory.resolve().parent / "dev").read_text().split(":")
    return os.makedev(int(major), int(minor))


def written(cgroup: Path, disk: int) -> int:
    """Bytes that the cgroup wrote to a disk so far; 0 if that is not counted."""
    for name, fields in _lines(cgroup / "io.stat"):
        if name == _name(disk):
            return int(fields.get("wbytes", "0"))
    return 0


def limit_line(cgroup: Path, disk: int, bytes_per_second: int | None = None) -> str:
    """What to write to io.max: the limits that are in force, with another one for writing if that is given."""
    fields = dict(pair.split("=") for pair in UNLIMITED.split())
    for name, found in _lines(cgroup / "io.max"):
        if name == _name(disk):
            fields |= found
    if bytes_per_second is not None:
        fields["wbps"] = str(bytes_per_second)
    return " ".join([_name(disk), *(f"{key}={value}" for key, value in fields.items())])


def _name(disk: int) -> str:
    return f"{os.major(disk)}:{os.minor(disk)}"


def _lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return  # the cgroup went, or has no such controller
    for line in lines:
        name, *pairs = line.split()
        yield name, dict(pair.split("=", 1) for pair in pairs if "=" in pair)
