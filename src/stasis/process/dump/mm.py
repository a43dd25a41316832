# SPDX-License-Identifier: Apache-2.0
"""The layout of an address space: its mappings, with what was asked for at mmap(2) and madvise(2)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stasis.linux import procfs
from stasis.linux.guardpages import guard_pages
from stasis.process.files.options import FileOptions
from stasis.process.files.regular import why_lost
from stasis.process.images.schema.memory import MmEntry, VmaEntry

if TYPE_CHECKING:
    from stasis.linux.procfs import Mapping
    from stasis.process.findings import Findings
    from stasis.process.remote import Remote
    from stasis.process.tree import Task

__all__ = ["PathFiles", "Vma", "VmaStatus", "check_mappings", "mm_entry", "vmas"]

# include/uapi/linux/mman.h, include/uapi/asm-generic/mman.h
PROT = {"r": 1, "w": 2, "x": 4}
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_GROWSDOWN = 1, 2, 0x20, 0x100
MAP_BY_FLAG = {"gd": MAP_GROWSDOWN, "lo": 0x2000, "nr": 0x4000, "ht": 0x40000}
MADV_BY_FLAG = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}

PR_GET_DUMPABLE, PR_GET_THP_DISABLE = 3, 42
VSYSCALL = 0xFFFFFFFFFF600000
DELETED = " (deleted)"
REFUSED = {
    "/memfd:": "memory shared through a memfd", "/SYSV": "System V shared memory", "/[aio]": "an asynchronous I/O ring",
    "anon_inode:": "a mapping of an anonymous inode", "/anon_hugepage": "huge pages", "socket:": "a mapped socket",
}  # fmt: skip


class VmaStatus:
    """Bits of an image's vma status."""

    REGULAR, STACK, VSYSCALL, VDSO, HEAP = 0x1, 0x2, 0x4, 0x8, 0x20
    FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE, VVAR = 0x40, 0x80, 0x100, 0x200, 0x1000


class PathFiles(Protocol):
    """Where files that are known by their path get their ids."""

    def path_file(self, pid: int, link: str, flags: int) -> int:
        """Id of the file behind /proc/PID/LINK, entered as opened with `flags`."""


class Vma(NamedTuple):
    """A mapping and the message for it."""

    mapping: Mapping
    entry: VmaEntry

    @property
    def has_private_pages(self) -> bool:
        """Whether contents are dumped with the task itself."""
        private = VmaStatus.FILE_PRIVATE | VmaStatus.ANON_PRIVATE | VmaStatus.VDSO
        return bool(self.entry.status & private)


def check_mappings(pid: int, mappings: Sequence[Mapping], findings: Findings) -> None:
    """Note what cannot be kept of an address space."""
    for mapping in mappings:
        where = f"memory at {mapping.start:#x} ({mapping.path or 'anonymous'})"
        for prefix, what in REFUSED.items():
            if mapping.path.startswith(prefix):
                findings.add(pid, where, f"{what} is not supported yet")
                break
        else:
            _check_file(pid, mapping, where, findings)
        if "io" in mapping.flags and not mapping.path.startswith("[v"):
            findings.add(pid, where, "it is the memory of a device")
        if "gu" in mapping.flags and _has_guards(pid, mapping):
            findings.add(pid, where, "guard pages (MADV_GUARD_INSTALL) are not supported yet")
        if "dp" in mapping.flags:
            findings.add(pid, where, "droppable memory is not supported yet")
        if "ht" in mapping.flags:
            findings.add(pid, where, "huge pages are not supported yet")
        if "sl" in mapping.flags and not mapping.path.startswith("[v"):
            findings.add(pid, where, "it is sealed, and an image has no place for that")


def _check_file(pid: int, mapping: Mapping, where: str, findings: Findings) -> None:
    """A deleted file is taken along, if it is not too large."""
    if mapping.path.startswith("/") and mapping.path.endswith(DELETED) and not _is_shared_anonymous(mapping):
        link = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        reason, option = why_lost(pid, os.readlink(link), os.stat(link), FileOptions().ghost_limit)
        if reason:
            findings.add(pid, where, reason, option)


def _has_guards(pid: int, mapping: Mapping) -> bool:
    """Whether there are any now: the flag stays when they are taken out."""
    try:
        return any(True for _ in guard_pages(pid, mapping.start, mapping.end))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return True  # a kernel that cannot tell


def _is_shared_anonymous(mapping: Mapping) -> bool:
    return mapping.path == "/dev/zero" + DELETED and mapping.is_shared


def vmas(pid: int, mappings: Sequence[Mapping], files: PathFiles) -> list[Vma]:
    """All mappings with their messages."""
    return [Vma(mapping, _entry(pid, mapping, files)) for mapping in mappings]


def _entry(pid: int, mapping: Mapping, files: PathFiles) -> VmaEntry:
    status = VmaStatus.REGULAR
    flags = MAP_SHARED if mapping.is_shared else MAP_PRIVATE
    shmid, offset = 0, mapping.offset
    if mapping.path in ("[vdso]", "[vsyscall]") or mapping.path.startswith("[vvar"):
        status |= {"[vdso]": VmaStatus.VDSO, "[vsyscall]": VmaStatus.VSYSCALL}.get(mapping.path, VmaStatus.VVAR)
        flags |= MAP_ANONYMOUS
        offset = 0
    elif mapping.path.startswith("/") and not _is_shared_anonymous(mapping):
        status |= VmaStatus.FILE_SHARED if mapping.is_shared else VmaStatus.FILE_PRIVATE
        shmid = files.path_file(pid, f"map_files/{mapping.start:x}-{mapping.end:x}", _open_flags(mapping))
    elif mapping.is_shared:
        status |= VmaStatus.ANON_SHARED
        flags |= MAP_ANONYMOUS
        shmid = mapping.inode
    else:
        status |= VmaStatus.ANON_PRIVATE | {"[heap]": VmaStatus.HEAP, "[stack]": VmaStatus.STACK}.get(mapping.path, 0)
        flags |= MAP_ANONYMOUS
        offset = 0
    for name, bit in MAP_BY_FLAG.items():
        flags |= bit if name in mapping.flags else 0
    return VmaEntry(
        start=mapping.start, end=mapping.end, pgoff=offset, shmid=shmid,
        prot=sum(PROT[letter] for letter in mapping.permissions[:3] if letter in PROT), flags=flags, status=status,
        fd=-1, madv=sum(1 << advice for name, advice in MADV_BY_FLAG.items() if name in mapping.flags) or None,
        fdflags=_open_flags(mapping) if status & (VmaStatus.FILE_SHARED | VmaStatus.FILE_PRIVATE) else None,
    )  # fmt: skip


def _open_flags(mapping: Mapping) -> int:
    """A shared mapping that may be written to needs its file open for that (VM_MAYWRITE, "mw")."""
    return os.O_RDWR if mapping.is_shared and "mw" in mapping.flags else os.O_RDONLY


def mm_entry(remote: Remote, task: Task, found: Sequence[Vma], exe_id: int) -> MmEntry:
    """The message for a task's address space."""
    stat = task.stat
    auxv = procfs.read(task.pid, "auxv")
    return MmEntry(
        mm_start_code=stat.start_code, mm_end_code=stat.end_code, mm_start_data=stat.start_data,
        mm_end_data=stat.end_data, mm_start_stack=stat.start_stack, mm_start_brk=stat.start_brk,
        mm_brk=remote.call("brk", 0), mm_arg_start=stat.arg_start, mm_arg_end=stat.arg_end,
        mm_env_start=stat.env_start, mm_env_end=stat.env_end, exe_file_id=exe_id,
        mm_saved_auxv=list(struct.unpack(f"<{len(auxv) // 8}Q", auxv)), vmas=[vma.entry for vma in found],
        dumpable=remote.call("prctl", PR_GET_DUMPABLE), thp_disabled=_thp_disabled(remote) or None,
    )  # fmt: skip


def _thp_disabled(remote: Remote) -> bool:
    try:
        return bool(remote.call("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
