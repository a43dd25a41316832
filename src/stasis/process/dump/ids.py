# SPDX-License-Identifier: Apache-2.0
"""Which tasks share an address space, a descriptor table, a working directory or signal handlers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from stasis.linux.kcmp import Kcmp, compare
from stasis.process.images.schema.tasks import TaskKobjIdsEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stasis.linux.mountinfo import MountInfo
    from stasis.process.images.imageset import ImageSet
    from stasis.process.tree import Task

__all__ = ["FIRST_ID", "NAMESPACES", "Home", "ObjectIds", "namespace_ids", "own_kinds", "own_kinds_of", "with_memory"]

FIRST_ID = 2
"""Ids below belong to the dumper, as CRIU counts."""

LESS = 1  # kcmp(2): the first one's object is less than the second one's

SHARED = {"vm": Kcmp.VM, "files": Kcmp.FILES, "fs": Kcmp.FS, "sighand": Kcmp.SIGHAND}

NAMESPACES = {
    "pid": "pid_ns_id", "net": "net_ns_id", "ipc": "ipc_ns_id", "uts": "uts_ns_id", "mnt": "mnt_ns_id",
    "user": "user_ns_id", "cgroup": "cgroup_ns_id", "time": "time_ns_id",
}  # fmt: skip
"""Name in /proc/PID/ns, and field of the image's message."""


class ObjectIds:
    """Gives equal ids to what is shared. A task is looked up among those before it, which are kept in the kernel's
    order of their objects."""

    def __init__(self) -> None:
        self._seen: dict[Kcmp, list[tuple[int, int]]] = {}

    def shared(self, pid: int) -> dict[str, int]:
        """Those of what a clone may share, by the names that `sharing` has for them."""
        return {name: self._id(kind, pid) for name, kind in SHARED.items()}

    def memory(self, pid: int) -> int:
        """That of the address space alone."""
        return self._id(Kcmp.VM, pid)

    def of(self, pid: int) -> TaskKobjIdsEntry:
        """The ids of a task's objects, its namespaces included."""
        entry = TaskKobjIdsEntry(**{f"{name}_id": number for name, number in self.shared(pid).items()})
        for field, number in namespace_ids(pid).items():
            setattr(entry, field, number)
        return entry

    def _id(self, kind: Kcmp, pid: int) -> int:
        seen = self._seen.setdefault(kind, [])
        low, high = 0, len(seen)
        while low < high:
            middle = (low + high) // 2
            order = compare(kind, pid, seen[middle][0])
            if order == 0:
                return seen[middle][1]
            low, high = (low, middle) if order == LESS else (middle + 1, high)
        seen.insert(low, (pid, number := FIRST_ID + len(seen)))
        return number


def with_memory(tasks: Iterable[Task]) -> list[Task]:
    """Those that live, of all that share an address space the first one."""
    ids = ObjectIds()
    found = {ids.memory(task.pid): task for task in reversed([task for task in tasks if not task.is_zombie])}
    return list(reversed(found.values()))


def namespace_ids(pid: int) -> dict[str, int]:
    """Field and id of each namespace: an inode number, cut to 32 bits as the image wants it."""
    found = {}
    for name, field in NAMESPACES.items():
        try:
            found[field] = os.stat(f"/proc/{pid}/ns/{name}").st_ino & 0xFFFFFFFF
        except FileNotFoundError:
            continue  # a kernel without this kind
    return found


def own_kinds(home: Mapping[str, int], theirs: Mapping[str, int]) -> list[str]:
    """Names of the kinds in which a process lives elsewhere than the dumper; both as `namespace_ids` gives them."""
    return [name for name, field in NAMESPACES.items() if theirs.get(field) != home.get(field)]


def own_kinds_of(images: ImageSet, ids: TaskKobjIdsEntry) -> list[str]:
    """The same of the first process of an image set. An id that the images lack is the dumper's own."""
    home = images.inventory.root_ids

    def number(entry: Any, field: str) -> int:
        return getattr(entry, field, None) or 0

    return [name for name, field in NAMESPACES.items() if number(ids, field) not in (0, number(home, field))]


class Home:
    """The namespaces of the dumper, which are not those of a worker that has entered others for it."""

    _ids: dict[str, int] | None = None
    _mounts: list[MountInfo] | None = None

    @classmethod
    def ids(cls) -> dict[str, int]:
        """Field and id of each."""
        return namespace_ids(os.getpid()) if cls._ids is None else cls._ids

    @classmethod
    def mounts(cls) -> list[MountInfo]:
        """What is mounted there."""
        from stasis.linux.mountinfo import mount_table  # 9 ms, which a restore need not wait for

        return mount_table() if cls._mounts is None else cls._mounts

    @classmethod
    def remember(cls) -> None:
        """Before another one is entered for a moment."""
        cls._ids = cls.ids()

    @classmethod
    def leave(cls) -> None:
        """In a worker, before it enters others."""
        from stasis.linux.mountinfo import mount_table

        cls._ids, cls._mounts = namespace_ids(os.getpid()), mount_table()
