# SPDX-License-Identifier: Apache-2.0
"""Mounting the file system on a block device read-only, or saying why there is none to mount.

util-linux does the work: blkid knows the file systems, mount finds the helper programs that some of them need.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stasis.block.frontend.node import wait_until
from stasis.errors import NotFoundError, StasisError, UnsupportedError, UsageError
from stasis.units import format_size

__all__ = ["FileSystem", "mount_read_only", "partition_node"]

NODE_WAIT = 10.0
ALWAYS = "ro,nosuid,nodev"
"""A backup may come from a machine whose users are not ours."""
_OPTIONS = {
    "ext3": ("", "noload"),
    "ext4": ("", "noload"),
    "xfs": ("nouuid", "nouuid,norecovery"),  # the file system that was backed up may be mounted here, too
    "btrfs": ("", "rescue=nologreplay"),
}
"""Options by type, in the order in which they are tried: first with the journal replayed, then without."""
_CONTAINERS = {
    "crypto_LUKS": "is encrypted (LUKS)",
    "LVM2_member": "is a physical volume of LVM",
    "linux_raid_member": "is a member of an MD array",
    "zfs_member": "is a member of a ZFS pool",
    "swap": "is swap space",
}


@dataclass(frozen=True)
class FileSystem:
    """What was mounted, and how: `replayed` tells whether a journal, if there was one in use, was replayed."""

    node: str
    type: str
    options: str
    replayed: bool


def partition_node(node: str, number: int | None) -> str:
    """The node of a partition of a block device; without a number the device itself.

    Raises NotFoundError, which lists the partitions that there are.
    """
    if number is None:
        return node
    found = f"{node}p{number}"
    if found not in _partitions(node) or not wait_until(lambda: os.path.exists(found), NODE_WAIT):
        raise NotFoundError(f"the backup has no partition {number}", hint=_listed(node))
    return found


def _partitions(node: str) -> list[str]:
    """The nodes of the partitions. Where the kernel does not know the kind of table, partx tells it what is in it."""
    pattern = f"{os.path.basename(node)}p*"
    if not list(Path("/sys/class/block").glob(pattern)):
        _run("partx", "--add", node)
    names = [path.name for path in Path("/sys/class/block").glob(pattern)]
    return [f"/dev/{name}" for name in sorted(names, key=lambda name: (len(name), name))]


def mount_read_only(node: str, directory: str) -> FileSystem:
    """Mount the file system on a device. Raises UnsupportedError or UsageError if there is none that can be."""
    kind, table = _tag(node, "TYPE"), _tag(node, "PTTYPE")
    if kind in _CONTAINERS:
        raise UnsupportedError(f"what was backed up {_CONTAINERS[kind]} and has no file system to mount",
                               hint="stasis backup serve --overlay offers it as a disk to its own tools")
    if not kind and table:
        raise UsageError(f"the backup holds a partition table ({table}) and no file system of its own",
                         hint=_listed(node))
    if not kind:
        raise UnsupportedError("no file system is known by its marks in the backup",
                               hint="stasis backup serve offers it as a disk")
    return _try_all(node, directory, kind)


def _try_all(node: str, directory: str, kind: str) -> FileSystem:
    failures = []
    for number, more in enumerate(_OPTIONS.get(kind, ("",))):
        options = ",".join(filter(None, (ALWAYS, more)))
        result = _run("mount", "-t", kind, "-o", options, node, directory)
        if not result.returncode:
            return FileSystem(node, kind, options, replayed=not number)
        failures.append(" ".join(result.stderr.split()) or f"mount ended with {result.returncode}")
    raise StasisError(f"the {kind} file system of the backup cannot be mounted: {failures[0]}",
                      hint="stasis backup serve --overlay offers it as a disk, to be repaired with fsck")


def _listed(node: str) -> str:
    """The partitions, as a hint."""
    found = [_described(partition, partition.removeprefix(f"{node}p")) for partition in _partitions(node)]
    return f"choose one with --partition N: {', '.join(found)}" if found else "it has no partitions"


def _described(partition: str, number: str) -> str:
    sectors = int(Path(f"/sys/class/block/{os.path.basename(partition)}/size").read_text())
    return f"{number} ({_tag(partition, 'TYPE') or 'unknown'}, {format_size(sectors * 512)})"


def _tag(node: str, name: str) -> str:
    """What blkid finds on the device itself, not what it may remember of it."""
    return _run("blkid", "-p", "-s", name, "-o", "value", node).stdout.strip()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # blkid, for those whose PATH has no such directories
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace",
                              env=os.environ | {"PATH": path, "LC_ALL": "C"}, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError(f"this host has no program {command[0]}", hint="install util-linux") from error
