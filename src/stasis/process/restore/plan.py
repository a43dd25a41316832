# SPDX-License-Identifier: Apache-2.0
"""What an image set says of each task, read and checked before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError
from stasis.process.dump.ids import NAMESPACES
from stasis.process.dump.mm import VmaStatus
from stasis.process.images.damage import damaged
from stasis.process.seals import refuse_sealed_system
from stasis.process.sharing import NAMES, Birth, Member, Sharing
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
    """A task to make. `cores` by thread id; a zombie has only its own and no memory. `birth` says how it is made, where
    it shares something. `children` are those that are made as processes of their own, `beside` those that are made with
    the address space of this one. `table`: the processes that have the descriptor table which this one fills; none
    where another one does. `shares_directory`: with others, of which one `sets_directory`."""

    def __init__(self, entry: PstreeEntry, cores: dict[int, CoreEntry]) -> None:
        self.entry = entry
        self.cores = cores
        self.ids: TaskKobjIdsEntry | None = None
        self.mm: MmEntry | None = None
        self.fs: FsEntry | None = None
        self.children: list[TaskPlan] = []
        self.birth = Birth()
        self.beside: list[TaskPlan] = []
        self.table = [self]
        self.table_pids = [self.pid]
        self.shares_directory = False
        self.sets_directory = True

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

    def ids_by_kind(self) -> dict[str, int]:
        """Ids of what a clone may share; none of a zombie."""
        return {} if self.ids is None else {kind: getattr(self.ids, f"{kind}_id") for kind in NAMES}

    def walk(self) -> Iterator[TaskPlan]:
        """This task, those beside it, and all below it, parents first."""
        yield self
        yield from self.beside
        for child in self.children:
            yield from child.walk()


def read_tree(images: ImageSet) -> TaskPlan:
    """All tasks of an image set as a tree. DamagedError, UnsupportedError."""
    refuse_sealed_system()
    path = images.file_path("pstree")
    plans: dict[int, TaskPlan] = {}
    root: TaskPlan | None = None
    for entry in images.messages("pstree"):
        if entry.pid in plans:
            raise damaged(path, 0, f"process {entry.pid} is there twice")
        plans[entry.pid] = plan = _read_task(images, entry)
        if root is None:
            root = plan
        elif entry.ppid in plans:
            plans[entry.ppid].children.append(plan)
        else:
            raise damaged(path, 0, f"process {entry.pid} has a parent that does not come before it")
    if root is None or root.is_zombie:
        raise damaged(path, 0, "it has no first process that lives")
    _share(root)
    return root


def _share(root: TaskPlan) -> None:
    """Note who makes whom of those that share something."""
    sharing = Sharing(_member(root))
    for pid, what, reason in sharing.problems:
        raise UnsupportedError(f"process {pid} cannot be made: {what}: {reason}")
    if not sharing.is_any:
        return
    plans = {plan.pid: plan for plan in root.walk()}
    for plan in plans.values():
        plan.birth = sharing.births[plan.pid]
        order = {pid: number for number, pid in enumerate(sharing.order.get(plan.pid, []))}
        own = [child for child in plan.children if not sharing.births[child.pid].beside]
        plan.children = sorted(own, key=lambda child: order[child.pid]) if order else own
        if plan.birth.beside:
            plans[plan.birth.beside].beside.append(plan)
            if _namespaces(plan) != _namespaces(plans[plan.birth.maker]):
                raise UnsupportedError(f"process {plan.pid} cannot be made: its namespaces are not those of process "
                                       f"{plan.birth.maker}, which it shares memory with")  # fmt: skip
    for first, *others in sharing.owners("files").values():
        plans[first].table += [plans[pid] for pid in others]
        for pid in others:
            plans[pid].table, plans[pid].table_pids = [], [first, *others]
    for pids in sharing.owners("fs").values():
        for pid in pids:
            plans[pid].shares_directory, plans[pid].sets_directory = True, pid == pids[0]


def _namespaces(plan: TaskPlan) -> list[int | None]:
    return [getattr(plan.ids, field) for field in NAMESPACES.values()]


def _member(plan: TaskPlan) -> Member:
    return Member(plan.pid, plan.entry.sid, plan.entry.pgid, plan.ids_by_kind(),
                  [_member(child) for child in plan.children])  # fmt: skip


def _read_task(images: ImageSet, entry: PstreeEntry) -> TaskPlan:
    plan = TaskPlan(entry, {entry.pid: images.one("core", entry.pid)})
    if plan.core.tc is None:
        raise damaged(images.file_path("core", entry.pid), 0, "it lacks what every process has")
    if plan.is_zombie:
        entry.threads = [entry.pid]  # CRIU's has one with any number
        return plan
    if entry.pid not in entry.threads:
        raise damaged(images.file_path("pstree"), 0, f"process {entry.pid} is none of its threads")
    plan.cores.update((tid, images.one("core", tid)) for tid in entry.threads if tid != entry.pid)
    cores = plan.cores
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
