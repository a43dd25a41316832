# SPDX-License-Identifier: Apache-2.0
"""What an image set holds, gathered for a person: its tasks, and of each the memory, files and sockets.

Only what says something about the whole is read; ids that lead nowhere show as "?", since a look must also work on a
set that cannot be restored, such as a pre-dump.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from stasis.process.images.describe import describe_file, describe_mapping, kind_of_file, protection
from stasis.process.images.imageset import ImageSet
from stasis.process.images.pagemap import PAGE_SIZE, PE_PRESENT, Pagemap

__all__ = ["Descriptor", "Mapping", "Summary", "Task", "summarize"]

_STATES: Final = {1: "alive", 2: "zombie", 3: "stopped"}
_CLOEXEC: Final = 1
_GUARD: Final = 0x10000  # an entry at the list's end that maps nothing itself


@dataclass(slots=True)
class Mapping:
    """A mapping; `kept` is how many bytes of it this set holds itself."""

    start: int
    end: int
    protection: str
    what: str
    kept: int


@dataclass(slots=True)
class Descriptor:
    """An open descriptor; `id` is the open file in files.img, the same for duplicates."""

    fd: int
    kind: str
    what: str
    close_on_exec: bool
    id: int


@dataclass(slots=True)
class Task:
    """A process. Sizes in bytes: `mapped` addresses, `kept` in this set, `in_parent` left to the set before."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    state: str
    command: str
    threads: list[int]
    uid: int | None = None
    exe: str | None = None
    cwd: str | None = None
    root: str | None = None
    mapped: int = 0
    kept: int = 0
    in_parent: int = 0
    files_id: int | None = None
    mappings: list[Mapping] = field(default_factory=list)
    descriptors: list[Descriptor] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    """An image set: format version, whether it continues another one, tasks with parents first."""

    path: str
    version: int
    continues_parent: bool
    kept: int
    shared: int
    tasks: list[Task]


class _Gatherer:
    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.files: dict[int, Any] = {entry.id: entry for entry in images.messages("files")}
        self.paths = {number: entry.reg.name for number, entry in self.files.items() if entry.reg is not None}

    def task(self, entry: Any) -> Task:
        task = Task(entry.pid, entry.ppid, entry.pgid, entry.sid, "?", "?", list(entry.threads))
        self._core(task)
        self._memory(task)
        self._places(task)
        self._descriptors(task)
        return task

    def _first(self, kind: str, number: int) -> Any:
        return next(iter(self.images.messages(kind, number)), None)

    def _core(self, task: Task) -> None:
        core = self._first("core", task.pid)
        if core is not None and core.tc is not None:
            task.state = _STATES.get(core.tc.task_state, str(core.tc.task_state))
            task.command = core.tc.comm
        if core is not None and core.thread_core is not None and core.thread_core.creds is not None:
            task.uid = core.thread_core.creds.uid

    def _memory(self, task: Task) -> None:
        pagemap = Pagemap.read(self.images, task.pid)
        if pagemap is not None:
            task.kept = pagemap.present_pages * PAGE_SIZE
            task.in_parent = _in_parent(pagemap)
        mm = self._first("mm", task.pid)
        if mm is None:
            return
        task.exe = self.paths.get(mm.exe_file_id, "?")
        for vma in mm.vmas:
            if not vma.status & _GUARD:
                task.mapped += max(vma.end - vma.start, 0)
            kept = 0 if pagemap is None else pagemap.present_bytes(vma.start, vma.end)
            task.mappings.append(
                Mapping(vma.start, vma.end, protection(vma), describe_mapping(vma, self.paths), kept))

    def _places(self, task: Task) -> None:
        places = self._first("fs", task.pid)
        if places is not None:
            task.cwd = self.paths.get(places.cwd_id, "?")
            task.root = self.paths.get(places.root_id, "?")

    def _descriptors(self, task: Task) -> None:
        ids = self._first("ids", task.pid)
        if ids is None:
            return
        task.files_id = ids.files_id
        for entry in self.images.messages("fdinfo", ids.files_id):
            file = self.files.get(entry.id)
            kind = entry.type.name.lower() if file is None else kind_of_file(file)
            what = "?" if file is None else describe_file(file)
            task.descriptors.append(Descriptor(entry.fd, kind, what, bool(entry.flags & _CLOEXEC), entry.id))


def _in_parent(pagemap: Pagemap) -> int:
    runs = (pagemap[index] for index in range(len(pagemap)))
    return sum(run.end - run.start for run in runs if not run.flags & PE_PRESENT)


def summarize(images: ImageSet) -> Summary:
    """Gather what a set holds. Errors of damaged images go through."""
    gatherer = _Gatherer(images)
    tasks = [gatherer.task(entry) for entry in images.messages("pstree")]
    shared = 0
    for number in images.numbers("pagemap-shmem"):
        pagemap = Pagemap.read(images, number, "pagemap-shmem")
        shared += 0 if pagemap is None else pagemap.present_pages * PAGE_SIZE
    return Summary(images.path, images.inventory.img_version, images.has_parent(), sum(task.kept for task in tasks),
                   shared, tasks)
