# SPDX-License-Identifier: Apache-2.0
"""Mount namespaces (mount_namespaces(7)): what is mounted in them, where, how, and with what in it.

A mount is one of three things, see `Way`. It shows a file system that is mounted outside as well: then a copy of that
mount is made, by its path outside. It shows one that the tree has alone and that has no contents of its own (proc,
sysfs and others), or a tmpfs, whose contents are taken along: then it is mounted anew. Or it shows such a one once
more.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from stasis.linux.mountinfo import DELETED, MountInfo
from stasis.process.dump.ids import Home, namespace_ids
from stasis.process.images.schema.namespaces import FsType, MntEntry
from stasis.process.namespaces import tmpfs
from stasis.process.namespaces.identities import Identities
from stasis.process.roots import mounts, places

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["FLAGS", "NEW", "PROPAGATION", "Way", "check", "make", "write"]

# include/uapi/linux/mount.h, MS_*
FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1 << 10, "nodiratime": 1 << 11,
         "relatime": 1 << 21, "nosymfollow": 1 << 8}  # fmt: skip
SUPERBLOCK_FLAGS = {"ro": 1, "sync": 16, "mand": 64, "dirsync": 128, "lazytime": 1 << 25}
UNBINDABLE, PRIVATE, SLAVE, SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
PROPAGATION = UNBINDABLE | PRIVATE | SLAVE | SHARED
NEW = {
    "proc": FsType.PROC, "sysfs": FsType.SYSFS, "tmpfs": FsType.TMPFS, "devpts": FsType.DEVPTS,
    "mqueue": FsType.MQUEUE, "overlay": FsType.OVERLAYFS,
}  # fmt: skip
"""What can be mounted anew, and its number in images."""
KNOWN = {
    **NEW, "devtmpfs": FsType.DEVTMPFS, "binfmt_misc": FsType.BINFMT_MISC, "pstore": FsType.PSTORE,
    "securityfs": FsType.SECURITYFS, "fusectl": FsType.FUSECTL, "debugfs": FsType.DEBUGFS, "cgroup": FsType.CGROUP,
    "tracefs": FsType.TRACEFS, "cgroup2": FsType.CGROUP2,
}  # fmt: skip


class Way(Enum):
    """How a mount comes back."""

    OUTSIDE = "a copy of one outside"
    ANEW = "mounted anew"
    AGAIN = "a copy of one inside"


class Plan(NamedTuple):
    """A mount and how it comes back: `outside` is the path there. It `shares` with that one, as its slave, or in its
    group (`is_peer`). `reason` says why it cannot."""

    mount: MountInfo
    way: Way = Way.ANEW
    outside: str = ""
    shares: bool = False
    reason: str = ""
    is_peer: bool = False


class _Table(NamedTuple):
    """A mount namespace: its mounts, without those that nobody can reach."""

    mounts: list[MountInfo]
    hidden: list[MountInfo]


def plans(number: int) -> tuple[list[Plan], list[MountInfo]]:
    """For all mounts of a namespace of the tree; and those that are left out, because nobody can reach them."""
    home = Home.mounts()
    tables = _tables(home)
    table = tables.get(number) or tables[0]
    bases = _bases([each.mounts for each in tables.values()])
    found = [_plan(mount, home, bases.get(mount.device)) for mount in _parents_first(table.mounts)]
    groups = Counter(mount.shared for each in tables.values() for mount in each.mounts)
    found = [plan._replace(reason=plan.reason or _why_cut_off(plan, table.mounts, groups)) for plan in found]
    return found, table.hidden


def _tables(home: Sequence[MountInfo]) -> dict[int, _Table]:
    """Of all mount namespaces of the tree but that of the dumper, that of the first process first; by number, 0 where
    there is only one."""
    found = {number: mounts(number) for number in places() if number != Home.ids().get("mnt_ns_id")}
    seen = {mount.device for table in (home, *found.values()) for mount in table if _is_seen(mount, table)}
    return {number: _without_hidden(table, seen) for number, table in found.items()}


def _bases(tables: Iterable[list[MountInfo]]) -> dict[tuple[int, int], int]:
    """By device: the mount that a file system which only the tree has is mounted anew for. One that can be reached,
    where there is one."""
    found: dict[tuple[int, int], list[tuple[bool, int]]] = {}
    for table in tables:
        for mount in _parents_first(table):
            if mount.root == "/":
                found.setdefault(mount.device, []).append((_is_seen(mount, table), mount.number))
    return {device: max(mounts, key=lambda mount: mount[0])[1] for device, mounts in found.items()}


def _without_hidden(table: list[MountInfo], seen: set[tuple[int, int]]) -> _Table:
    """Left out are mounts that have nothing but another one over the whole of them, and show what is nowhere else to
    be had. `seen`: devices of mounts that can be reached, outside or in any namespace of the tree."""
    hidden = []
    for mount in table:
        over = [other for other in table if other.parent == mount.number]
        alone = sum(other.device == mount.device for other in table) == 1 and mount.device not in seen
        if alone and len(over) == 1 and over[0].target == mount.target != "/":
            hidden.append(mount)
            table = [other._replace(parent=mount.parent) if other is over[0] else other
                     for other in table if other is not mount]  # fmt: skip
    return _Table(table, hidden)


def _parents_first(table: Sequence[MountInfo]) -> Iterable[MountInfo]:
    """What lies over the whole of another mount behind what is mounted within that."""
    below: dict[int, list[MountInfo]] = {}
    numbers = {mount.number for mount in table}
    waiting = [mount for mount in table if mount.parent not in numbers]
    for mount in table:
        below.setdefault(mount.parent, []).append(mount)
    while waiting:
        mount = waiting.pop(0)
        yield mount
        waiting += sorted(below.get(mount.number, ()), key=lambda child: child.target == mount.target)


def _plan(mount: MountInfo, home: Sequence[MountInfo], base: int | None) -> Plan:
    """`base`: the mount that its file system is mounted anew for, if it is."""
    if mount.root.endswith(DELETED):
        return Plan(mount, reason="the directory or file that it shows was deleted")
    outside = [plan for other in home if (plan := _outside(mount, other, home)) is not None]
    if outside:
        return max(outside, key=lambda plan: plan.shares)  # the first one of those
    if mount.fstype not in NEW:
        return Plan(mount, reason=f"a {mount.fstype} that is not mounted outside as well cannot be mounted again")
    if base is None:
        return Plan(mount, reason=f"it shows {mount.root} of a {mount.fstype} of which nothing else is mounted")
    return Plan(mount, Way.ANEW if base == mount.number else Way.AGAIN)


def _outside(mount: MountInfo, other: MountInfo, home: Sequence[MountInfo]) -> Plan | None:
    """As a copy of another one that is outside, if it is one."""
    if (other.device, other.fstype) != (mount.device, mount.fstype) or not _is_seen(other, home):
        return None
    inside = _below(mount.root, other.root)
    if inside is None:
        return None
    shares = bool(mount.shared and mount.shared == other.shared)
    shares |= bool(mount.master and mount.master in (other.shared, other.master))
    return Plan(mount, Way.OUTSIDE, os.path.normpath(f"{other.target}/{inside}"), shares,
                is_peer=bool(mount.shared and mount.shared == other.shared))  # fmt: skip


def _below(path: str, root: str) -> str | None:
    """The rest of a path behind a root; None where it is not below."""
    if path == root:
        return ""
    start = root.rstrip("/") + "/"
    return path[len(start) :] if path.startswith(start) else None


def _is_seen(mount: MountInfo, table: Sequence[MountInfo]) -> bool:
    """Whether its path leads to it: nothing is mounted over the whole of it."""
    return not any(other.parent == mount.number and other.target == mount.target for other in table)


def _why_cut_off(plan: Plan, table: Sequence[MountInfo], groups: Mapping[int, int]) -> str:
    """Why its propagation cannot be kept; "" where it can. `groups`: how many mounts of the tree each has."""
    mount = plan.mount
    if mount.master and not plan.shares and not groups[mount.master]:
        return "it gets mounts from a group that is not in the tree's mount namespace"
    if plan.way is Way.ANEW and mount.fstype == "tmpfs" and not _is_seen(mount, table):
        return "another mount lies over the whole of it, and its contents cannot be reached"
    return ""


def check(root: int, findings: Findings) -> None:
    """Note what cannot be kept."""
    found, _ = plans(_number(root))
    for plan in found:
        if plan.reason:
            findings.add(root, f"mount {plan.mount.target} ({plan.mount.fstype})", plan.reason)
    if not any(plan.mount.fstype == "proc" and plan.mount.target == "/proc" for plan in found):
        findings.add(root, "mnt namespace", "nothing is mounted on its /proc, which a restore needs")


def _number(pid: int) -> int:
    return namespace_ids(pid)["mnt_ns_id"]


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """The table, and what is in file systems that would be lost."""
    found, hidden = plans(number)
    for plan in found:
        out.write("mountpoints", _entry(plan), number=number)
    contents = [plan.mount for plan in found if plan.way is Way.ANEW and plan.mount.fstype == "tmpfs"]
    if contents:
        tmpfs.write(root, contents, out)
    return [f"the mount {mount.target} ({mount.fstype}) that another one hides will not be there" for mount in hidden]


def _entry(plan: Plan) -> MntEntry:
    mount = plan.mount
    flags = sum(FLAGS[flag] for flag in mount.flags if flag in FLAGS)
    kind = SHARED if mount.shared else 0
    kind |= SLAVE if mount.master and not plan.is_peer else 0  # a peer gets what comes to its group
    kind |= UNBINDABLE if mount.unbindable else 0
    entry = MntEntry(
        fstype=KNOWN.get(mount.fstype, FsType.AUTO), mnt_id=mount.number,
        root_dev=mount.device[0] << 20 | mount.device[1], parent_mnt_id=mount.parent, flags=flags | (kind or PRIVATE),
        root=mount.root, mountpoint=mount.target, source=mount.source,
        options=",".join(_inside(word) for word in mount.options if word not in (*SUPERBLOCK_FLAGS, "rw")),
        shared_id=mount.shared or None, master_id=None if plan.is_peer else mount.master or None, fsname=mount.fstype,
        sb_flags=sum(SUPERBLOCK_FLAGS[word] for word in mount.options if word in SUPERBLOCK_FLAGS),
    )  # fmt: skip
    if plan.way is Way.OUTSIDE:
        entry.ext_mount, entry.ext_key = True, plan.outside
        entry.internal_sharing = not plan.shares
    return entry


def _inside(option: str) -> str:
    """With the numbers that users and groups have in the tree."""
    name, _, value = option.partition("=")
    if name not in ("uid", "gid") or not value.isdecimal():
        return option
    inside = Identities.inside()
    return f"{name}={inside.uid(int(value)) if name == 'uid' else inside.gid(int(value))}"


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """A namespace with this table, and us at its root."""
    from stasis.process.namespaces.mounting import Tables

    for fds in Tables([number], chain[0], settings).make().values():
        for fd in fds:
            os.close(fd)


