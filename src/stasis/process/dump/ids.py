# SPDX-License-Identifier: Apache-2.0
"""Which tasks share an address space, a descriptor table, a working directory or signal handlers."""

from __future__ import annotations

import os

from stasis.linux.kcmp import Kcmp, compare
from stasis.process.images.schema.tasks import TaskKobjIdsEntry

__all__ = ["FIRST_ID", "NAMESPACES", "ObjectIds", "namespace_ids"]

FIRST_ID = 2
"""Ids below belong to the dumper, as CRIU counts."""

NAMESPACES = {
    "pid": "pid_ns_id", "net": "net_ns_id", "ipc": "ipc_ns_id", "uts": "uts_ns_id", "mnt": "mnt_ns_id",
    "user": "user_ns_id", "cgroup": "cgroup_ns_id", "time": "time_ns_id",
}  # fmt: skip
"""Name in /proc/PID/ns, and field of the image's message."""


class ObjectIds:
    """Gives equal ids to what is shared. A task is compared with those before it."""

    def __init__(self) -> None:
        self._seen: dict[Kcmp, list[tuple[int, int]]] = {}

    def of(self, pid: int) -> TaskKobjIdsEntry:
        """The ids of a task's objects, its namespaces included."""
        vm, files, fs, sighand = (self._id(kind, pid) for kind in (Kcmp.VM, Kcmp.FILES, Kcmp.FS, Kcmp.SIGHAND))
        entry = TaskKobjIdsEntry(vm_id=vm, files_id=files, fs_id=fs, sighand_id=sighand)
        for field, number in namespace_ids(pid).items():
            setattr(entry, field, number)
        return entry

    def _id(self, kind: Kcmp, pid: int) -> int:
        seen = self._seen.setdefault(kind, [])
        for other, number in seen:
            if compare(kind, pid, other) == 0:
                return number
        number = FIRST_ID + len(seen)
        seen.append((pid, number))
        return number


def namespace_ids(pid: int) -> dict[str, int]:
    """Field and id of each namespace: an inode number, cut to 32 bits as the image wants it."""
    found = {}
    for name, field in NAMESPACES.items():
        try:
            found[field] = os.stat(f"/proc/{pid}/ns/{name}").st_ino & 0xFFFFFFFF
        except FileNotFoundError:
            continue  # a kernel without this kind
    return found
