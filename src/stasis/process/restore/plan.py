# SPDX-License-Identifier: Apache-2.0
"""What an image set says of each task, read and checked before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError
from stasis.process.dump.mm import VmaStatus
from stasis.process.images.damage import damaged
from stasis.process.seals import refuse_sealed_system
from stasis.process.tree import TaskState

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.memory import MmEntry
    from stasis.process.images.schema.tasks import CoreEntry, FsEntry, PstreeEntry, TaskKobjIdsEntry

__all__ = ["TaskPlan", "read_tree"]

PAGE = 4096
USER_END = 1 << 47
SUPPORTED_VMAS = (
    VmaStatus.ANON_PRIVATE | VmaStatus.ANON_SHARED | VmaStatus.FILE_PRIVATE | VmaStatus.FILE_SHARED | VmaStatus.VDSO
    | VmaStatus.VVAR | VmaStatus.VSYSCALL | VmaStatus.SYSVIPC | VmaStatus.AIORING | VmaStatus.GUARD
)  # fmt: skip


class TaskPlan:
    """A task to make. `cores` by thread id; a zombie has only its own and no memory."""

    def __init__(self, entry: PstreeEntry, cores: dict[int, CoreEntry]) -> None:
        self.entry = entry
        self.cores = cores
        self.ids: TaskKobjIdsEntry | None = None
        self.mm: MmEntry | None = None
        self.fs: FsEntry | None = None
        self.children: list[TaskPlan] = []

    @property
    def pid(self) -> int:
        return self.entry.pid

    @property
    def core(self) -> CoreEntry:
        """That of the first thread."""
        return self.cores[self.pid]

    @property
    def is_zombie(self) -> bool:
        task = self.core.tc
        return task is not None and task.task_state == TaskState.ZOMBIE

    def walk(self) -> Iterator[TaskPlan]:
        """This task and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def read_tree(images: ImageSet) -> TaskPlan:
    """All tasks of an image set as a tree. DamagedError, UnsupportedError."""
    refuse_sealed_system()
    path = images.file_path("pstree")
    plans: dict[int, TaskPlan] = {}
    root: TaskPlan | None = None
    for entry in images.messages("pstree"):
        if entry.pid in plans or not entry.threads or entry.pid not in entry.threads:
            raise damaged(path, 0, f"process {entry.pid} is there twice or has no threads")
        plans[entry.pid] = plan = _read_task(images, entry)
        if root is None:
            root = plan
        elif entry.ppid in plans:
            plans[entry.ppid].children.append(plan)
        else:
            raise damaged(path, 0, f"process {entry.pid} has a parent that does not come before it")
    if root is None or root.is_zombie:
        raise damaged(path, 0, "it has no first process that lives")
    return root


def _read_task(images: ImageSet, entry: PstreeEntry) -> TaskPlan:
    cores = {tid: images.one("core", tid) for tid in entry.threads}
    plan = TaskPlan(entry, cores)
    if plan.core.tc is None:
        raise damaged(images.file_path("core", entry.pid), 0, "it lacks what every process has")
    if plan.is_zombie:
        return plan
    plan.ids, plan.mm, plan.fs = (images.one(kind, entry.pid) for kind in ("ids", "mm", "fs"))
    for tid, core in cores.items():
        if core.thread_info is None or core.thread_core is None:
            raise damaged(images.file_path("core", tid), 0, "it lacks the registers of its thread")
    _check_memory(images, plan)
    return plan


def _check_memory(images: ImageSet, plan: TaskPlan) -> None:
    assert plan.mm is not None
    path = images.file_path("mm", plan.pid)
    end = 0
    for vma in plan.mm.vmas:
        if vma.status & VmaStatus.VSYSCALL:
            continue
        is_guard = bool(vma.status & VmaStatus.GUARD)  # they come behind all others, and lie within them
        if vma.start % PAGE or vma.end % PAGE or not (0 if is_guard else end) <= vma.start < vma.end <= USER_END:
            raise damaged(path, 0, f"there cannot be memory from {vma.start:#x} to {vma.end:#x}")
        end = end if is_guard else vma.end
        if not vma.status & SUPPORTED_VMAS:
            raise UnsupportedError(
                f"process {plan.pid} has memory at {vma.start:#x} of a kind that cannot be restored yet "
                f"(status {vma.status:#x})"
            )
