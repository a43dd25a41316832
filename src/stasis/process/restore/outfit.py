# SPDX-License-Identifier: Apache-2.0
"""What a process of a restore gets while it is this program still, and can do in Python: its files, its directories,
its terminal, and what its memory is made from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from stasis.process.dump.mm import VmaStatus
from stasis.process.images.pagemap import Pagemap
from stasis.process.restore.shared import make_shared

if TYPE_CHECKING:
    from stasis.process.files.opening import FileSet
    from stasis.process.restore.crew import Crew
    from stasis.process.restore.plan import TaskPlan

__all__ = ["Ready", "enter_namespaces", "open_everything", "prepare", "share_memory", "take_terminal"]


class Ready:
    """What a process told when it was ready: where in it the descriptors are that its memory is made from. `pages_fd`:
    files of the images by device and inode, in a process that cannot open them by the restorer's path. `pieces`:
    length and place of what lies ready of it, by the address where it is to be. `pages_shared` of the `pages_compared`
    with its parent's are the same, and shared with it."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.pid = int(report["pid"])
        self.report_fd = int(report["report"])
        self.file_fd = {(int(number), int(flags)): int(fd) for number, flags, fd in report["files"]}
        self.shared_fd = {int(number): int(fd) for number, fd in report["shared"]}
        self.pieces = {int(start): (int(length), int(place)) for start, length, place in report["pieces"]}
        self.pages_fd = {(int(device), int(inode)): int(fd) for device, inode, fd in report["images"]}
        self.pages_compared, self.pages_shared = report["compared"]

    @property
    def fds(self) -> list[int]:
        """All of them, to be closed in the end."""
        return [*self.file_fd.values(), *self.shared_fd.values(), *self.pages_fd.values(), self.report_fd]


def enter_namespaces(crew: Crew) -> None:
    """The first process goes into namespaces that the tree has of its own; all others are born there."""
    ids = crew.root.ids
    assert ids is not None
    if not crew.own:
        return
    from stasis.process.namespaces.own import Settings, make_namespaces

    make_namespaces(ids, crew.chain, Settings(crew.links, crew.files.map_path, crew.copies))


def open_everything(crew: Crew) -> None:
    """What processes share is opened by the first one, and inherited by the others."""
    living = [one for one in crew.root.walk() if one.ids is not None]
    mapped = {number for one in living for number, _ in _mapped_files(one)}
    crew.files.open_all(sorted({one.ids.files_id for one in living if one.ids is not None}), sorted(mapped))
    made = crew.shared_fd or make_shared(list(crew.root.walk()), crew.chain)
    crew.shared_fd = {number: crew.files.move(fd) for number, fd in made.items()}


def share_memory(plan: TaskPlan, crew: Crew) -> None:
    """Take over what the parent had ready, and have ready what children may share."""
    if not crew.root.children:
        return
    from stasis.process.restore.inheritance import Inheritance

    if crew.inheritance is None:
        crew.inheritance = Inheritance()
    crew.inheritance.take_over(plan, crew.chain)
    crew.inheritance.prepare(plan, crew.chain, crew.files, crew.root.walk())


def take_terminal(sid: int, crew: Crew, *, first: bool) -> None:
    """In the leader of a session: take its terminal before others are born who inherit it; when all groups are there,
    put the right one in front."""
    if not crew.files.images.has("tty-info"):
        return
    from stasis.process.files.terminals import controlled, put_in_front, take_control

    path, pgid = controlled(crew.files.images).get(sid, ("", 0))
    if path and first:
        take_control(path)
    elif path and pgid and os.getsid(0) == os.getpid():
        put_in_front(path, pgid)


def prepare(plan: TaskPlan, crew: Crew) -> dict[str, Any]:
    """Have all that this process is to have; what it tells of it to whoever makes its memory."""
    assert plan.fs is not None
    assert plan.ids is not None
    assert plan.mm is not None
    files, report = crew.files, crew.reports.writer
    take_terminal(plan.pid, crew, first=False)
    os.umask(plan.fs.umask or 0)
    os.chdir(files.map_path(files.file_name(plan.fs.cwd_id)))
    mapped = _open_mapped(plan, files)
    shared = _shared_of(plan, crew)
    files.set_owners(plan.ids.files_id)
    images = _pages_files(plan, crew)
    files.place(plan.ids.files_id, [report, *(fd for _, _, fd in (*mapped, *images)), *shared.values()])
    if root := _root(plan, crew):
        os.chroot(root)
    told: dict[str, Any] = {"pid": os.getpid(), "report": report, "files": mapped, "shared": list(shared.items()),
                            "images": images}  # fmt: skip
    if (ours := crew.inheritance) is None:
        return {**told, "pieces": [], "compared": (0, 0)}
    pieces = [(piece.start, piece.length, piece.place) for piece in ours.pieces]
    return {**told, "pieces": pieces, "compared": (ours.compared, ours.shared)}


def _root(plan: TaskPlan, crew: Crew) -> str:
    """The root directory that it is to change to; "" for none."""
    assert plan.fs is not None
    name = crew.files.file_name(plan.fs.root_id)
    root = crew.files.map_path(name)
    return "" if root == "/" or (name == "/" and "mnt" in crew.own) else root


def _pages_files(plan: TaskPlan, crew: Crew) -> list[tuple[int, int, int]]:
    """(device, inode, descriptor) of the files that have its pages, where it is to live in other namespaces."""
    if not crew.own and not _root(plan, crew):
        return []
    found = []
    for images in crew.chain:
        pagemap = Pagemap.read(images, plan.pid)
        if pagemap is not None and pagemap.present_pages:
            fd = crew.files.move(images.open_pages(pagemap.pages_id))
            status = os.fstat(fd)
            found.append((status.st_dev, status.st_ino, fd))
    return found


def _shared_of(plan: TaskPlan, crew: Crew) -> dict[int, int]:
    assert plan.mm is not None
    used = {vma.shmid for vma in plan.mm.vmas if vma.status & VmaStatus.ANON_SHARED}
    return {number: fd for number, fd in crew.shared_fd.items() if number in used}


def _mapped_files(plan: TaskPlan) -> set[tuple[int, int]]:
    """(id, open flags) of every file that the memory is made from, the program included."""
    assert plan.mm is not None
    of_file = VmaStatus.FILE_PRIVATE | VmaStatus.FILE_SHARED
    found = {(vma.shmid, vma.fdflags or 0) for vma in plan.mm.vmas if vma.status & of_file}
    found.add((plan.mm.exe_file_id, os.O_RDONLY))
    return found


def _open_mapped(plan: TaskPlan, files: FileSet) -> list[tuple[int, int, int]]:
    """The same with a descriptor of this process."""
    wanted = sorted(_mapped_files(plan))
    return [(number, flags, files.move(files.open_path(number, flags))) for number, flags in wanted]
