# SPDX-License-Identifier: Apache-2.0
"""What a process of a restore gets while it is this program still, and can do in Python: its files, its directories,
its terminal, and what its memory is made from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from stasis.process.dump.mm import VmaStatus, is_shared_memory
from stasis.process.images.pagemap import Pagemap
from stasis.process.restore.shared import make_shared
from stasis.process.sharing import CLONE_FILES, CLONE_FS

if TYPE_CHECKING:
    from stasis.process.files.opening import FileSet
    from stasis.process.restore.crew import Crew
    from stasis.process.restore.plan import TaskPlan

__all__ = ["Beside", "Ready", "enter_namespaces", "open_everything", "prepare", "share_memory", "take_terminal"]


class Beside(NamedTuple):
    """Descriptors for a process with the address space of another one. `table`: numbers, whether they are closed by
    execve(2), and for what; None for that of its maker. `directory`: working directory and root; none as its maker."""

    table: list[tuple[int, bool, int]] | None
    directory: list[int]


class Ready:
    """What a process told when it was ready: where in it the descriptors are that its memory is made from. `pages_fd`:
    files of the images by device and inode, in a process that cannot open them by the restorer's path. `pieces`:
    length and place of what lies ready of it, by the address where it is to be. `pages_shared` of the `pages_compared`
    with its parent's are the same, and shared with it. `directory`: the working directory and root that it shares with
    others, of which it is the first. `beside`: what is for those with its address space. `ours`: what we used."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.pid = int(report["pid"])
        self.file_fd = {(int(number), int(flags)): int(fd) for number, flags, fd in report["files"]}
        self.shared_fd = {int(number): int(fd) for number, fd in report["shared"]}
        self.pieces = {int(start): (int(length), int(place)) for start, length, place in report["pieces"]}
        self.pages_fd = {(int(device), int(inode)): int(fd) for device, inode, fd in report["images"]}
        self.pages_compared, self.pages_shared = report["compared"]
        self.ours = [int(fd) for fd in report["ours"]]
        self.directory = [int(fd) for fd in report["directory"]]
        self.beside = {int(pid): Beside(table, directory) for pid, table, directory in report["beside"]}

    @property
    def fds(self) -> list[int]:
        """Those to be closed when the memory is there."""
        return [*self.file_fd.values(), *self.shared_fd.values(), *self.pages_fd.values(), *self.ours, *self.directory]


def enter_namespaces(crew: Crew) -> None:
    """The first process goes into namespaces that the tree has of its own; all others are born there."""
    ids = crew.root.ids
    assert ids is not None
    if not crew.own and not crew.apart:
        return
    from stasis.process.namespaces.own import Settings, make_namespaces

    settings = Settings(crew.links, crew.files.paths.outside, crew.copies, crew.apart.living_in)
    crew.apart.make(crew.chain, settings)
    make_namespaces(ids, crew.chain, settings, but=["mnt"] if crew.apart.has_mounts else [])
    crew.apart.note_own()
    if crew.apart.has_mounts:
        crew.apart.make_mounts(crew.chain, settings)


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
        take_control(crew.files.path(path, -1))
    elif path and pgid and os.getsid(0) == os.getpid():
        put_in_front(crew.files.path(path, -1), pgid)


def prepare(plan: TaskPlan, crew: Crew) -> dict[str, Any]:
    """Have all that this process is to have; what it tells of it to whoever makes its memory."""
    assert plan.fs is not None
    if not plan.shares_directory:
        os.umask(plan.fs.umask or 0)
        os.chdir(crew.files.path_of(plan.fs.cwd_id))
    told: dict[str, Any] = {"pid": os.getpid(), **(_fill_table(plan, crew) if plan.table else {})}
    if (root := _root(plan, crew)) and not plan.shares_directory:
        os.chroot(root)
    if (ours := crew.inheritance) is None:
        return {**told, "pieces": [], "compared": (0, 0)}
    pieces = [(piece.start, piece.length, piece.place) for piece in ours.pieces]
    return {**told, "pieces": pieces, "compared": (ours.compared, ours.shared)}


def _fill_table(plan: TaskPlan, crew: Crew) -> dict[str, Any]:
    """Fill the descriptor table of this process, and have all in it that the memory is made from of those who share
    it. Nobody else uses it meanwhile."""
    assert plan.ids is not None
    files, ours = crew.files, [crew.reports.writer]
    if len(plan.table) > 1:
        ours += [gate.reader for gate in crew.gates.values()]  # some may read from them still
    told = [_opened(one, crew) for one in plan.table]
    files.set_owners(plan.ids.files_id)
    files.place(plan.ids.files_id, [*ours, *(fd for one in told for fd in _numbers(one))])
    told[0]["ours"] = ours
    return {**told[0], "others": told[1:]}


def _opened(plan: TaskPlan, crew: Crew) -> dict[str, Any]:
    """What the memory of a process is made from, and what those beside it are to have."""
    files = crew.files
    shared = {number: files.another(fd) for number, fd in _shared_of(plan, crew).items()}
    return {
        "pid": plan.pid, "files": _open_mapped(plan, files), "shared": list(shared.items()),
        "images": _pages_files(plan, crew), "ours": [],
        "directory": _directory(plan, crew) if plan.shares_directory and plan.sets_directory else [],
        "beside": [(one.pid, _table_beside(one, files), _directory_beside(one, crew)) for one in plan.beside],
    }  # fmt: skip


def _numbers(told: dict[str, Any]) -> list[int]:
    """All descriptors that a report of `_opened` names."""
    mapped = [fd for _, _, fd in (*told["files"], *told["images"])]
    beside = [fd for _, table, directory in told["beside"] for fd in (*(fd for _, _, fd in table or ()), *directory)]
    return [*mapped, *(fd for _, fd in told["shared"]), *told["directory"], *beside]


def _table_beside(plan: TaskPlan, files: FileSet) -> list[tuple[int, bool, int]] | None:
    """None where it shares that of the one that makes it."""
    assert plan.ids is not None
    if plan.birth.flags & CLONE_FILES:
        return None
    found = files.spare(plan.ids.files_id)
    files.set_owners(plan.ids.files_id)
    return found


def _directory_beside(plan: TaskPlan, crew: Crew) -> list[int]:
    return [] if plan.birth.flags & CLONE_FS else _directory(plan, crew)


def _directory(plan: TaskPlan, crew: Crew) -> list[int]:
    """Descriptors for a working directory, and for a root where it has one of its own."""
    assert plan.fs is not None
    root = _root(plan, crew)
    paths = [crew.files.path_of(plan.fs.cwd_id), *([root] if root else [])]
    return [crew.files.move(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) for path in paths]


def _root(plan: TaskPlan, crew: Crew) -> str:
    """The root directory that it is to change to; "" for none."""
    assert plan.fs is not None
    found = crew.files.regular(plan.fs.root_id)
    root = crew.files.path_of(plan.fs.root_id)
    return "" if root == "/" or (found.name == "/" and crew.files.paths.is_made_here(found.mnt_id)) else root


def _pages_files(plan: TaskPlan, crew: Crew) -> list[tuple[int, int, int]]:
    """(device, inode, descriptor) of the files that have its pages, where it is to live in other namespaces."""
    if not crew.own and not crew.apart.has_mounts and not _root(plan, crew):
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
    used = {vma.shmid for vma in plan.mm.vmas if is_shared_memory(vma)}
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
