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
from stasis.linux.taskmem import TaskMemory
from stasis.process.dump.canary import is_canary
from stasis.process.files.options import FileOptions
from stasis.process.files.regular import why_lost
from stasis.process.images.schema.memory import AioRingEntry, MmEntry, VmaEntry

if TYPE_CHECKING:
    from stasis.linux.procfs import Mapping
    from stasis.process.findings import Findings
    from stasis.process.remote import Remote
    from stasis.process.tree import Task

__all__ = ["PathFiles", "Vma", "VmaStatus", "check_mappings", "is_shared_memory", "mm_entry", "vmas"]

# include/uapi/linux/mman.h, include/uapi/asm-generic/mman.h
PROT = {"r": 1, "w": 2, "x": 4}
MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE, MAP_ANONYMOUS, MAP_GROWSDOWN = 1, 2, 8, 0x20, 0x100
MAP_TYPE, MAP_HUGE_SHIFT = 0xF, 26
MAP_BY_FLAG = {"gd": MAP_GROWSDOWN, "lo": 0x2000, "nr": 0x4000, "ht": 0x40000}
MADV_BY_FLAG = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}

SHADOW_STACK = "ss"
PR_GET_DUMPABLE, PR_GET_THP_DISABLE = 3, 42
VSYSCALL = 0xFFFFFFFFFF600000
DELETED = " (deleted)"
REFUSED = {
    "anon_inode:[io_uring]": "an io_uring", "anon_inode:": "a mapping of an anonymous inode",
    "socket:": "a mapped socket",
}  # fmt: skip
HUGE = "/anon_hugepage" + DELETED
MOST_AUXV = 44 * 8
"""CRIU takes no more (AT_VECTOR_SIZE); the pair of zeroes at the end need not be there."""
SHARED_IDS = 1 << 31
"""Ids of shared memory begin here: those of System V segments, which are small, have theirs in the same images."""


class VmaStatus:
    """Bits of an image's vma status."""

    REGULAR, STACK, VSYSCALL, VDSO, HEAP = 0x1, 0x2, 0x4, 0x8, 0x20
    FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE, VVAR = 0x40, 0x80, 0x100, 0x200, 0x1000
    SYSVIPC, AIORING, MEMFD, GUARD = 0x400, 0x2000, 0x4000, 0x10000
    KERNELS = VDSO | VVAR | VSYSCALL  # what the kernel maps; CRIU's have ANON_PRIVATE, too


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
        if kernels := self.entry.status & VmaStatus.KERNELS:
            return kernels == VmaStatus.VDSO
        private = VmaStatus.FILE_PRIVATE | VmaStatus.ANON_PRIVATE | VmaStatus.AIORING
        return bool(self.entry.status & private) and self.entry.flags & MAP_TYPE != MAP_DROPPABLE


def check_mappings(
    pid: int, mappings: Sequence[Mapping], findings: Findings, options: FileOptions | None = None
) -> None:
    """Note what cannot be kept of an address space."""
    for mapping in mappings:
        where = f"memory at {mapping.start:#x} ({mapping.path or 'anonymous'})"
        for prefix, what in REFUSED.items():
            if mapping.path.startswith(prefix):
                findings.add(pid, where, f"{what} is not supported yet")
                break
        else:
            _check_file(pid, mapping, where, findings, options or FileOptions())
        if SHADOW_STACK in mapping.flags:
            findings.add(pid, where, "it is a shadow stack, which nobody can fill from outside")
        if "io" in mapping.flags and not mapping.path.startswith("[v"):
            findings.add(pid, where, "it is the memory of a device")
        if "gu" in mapping.flags and guards_of(pid, mapping) is None:
            findings.add(pid, where, "this kernel does not tell where it has guard pages (MADV_GUARD_INSTALL)")
        if kind_of(mapping) == VmaStatus.AIORING:
            _check_ring(pid, mapping, where, findings)

    if any(kind_of(mapping) == VmaStatus.SYSVIPC for mapping in mappings):
        from stasis.process.sysvshm import check_segments

        check_segments(pid, mappings, findings)


def _check_ring(pid: int, mapping: Mapping, where: str, findings: Findings) -> None:
    from stasis.process.aio import why_lost as why_ring_lost

    memory = TaskMemory(pid)
    try:
        if reason := why_ring_lost(memory, mapping):
            findings.add(pid, where, reason, passes=True)
    finally:
        memory.close()


def _rings(remote: Remote, found: Sequence[Vma]) -> list[AioRingEntry]:
    mappings = [vma.mapping for vma in found if vma.entry.status & VmaStatus.AIORING]
    if not mappings:
        return []
    from stasis.process.aio import ring_of

    return [ring_of(remote.memory, mapping) for mapping in mappings]


def _check_file(pid: int, mapping: Mapping, where: str, findings: Findings, options: FileOptions) -> None:
    """A deleted file is taken along, if it is not too large."""
    if mapping.path.startswith("/memfd:") and mapping.is_shared and "mw" in mapping.flags:
        from stasis.process.files.memfd import why_mapping_lost

        if reason := why_mapping_lost(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"):
            findings.add(pid, where, reason)
        return
    is_file = kind_of(mapping) & (VmaStatus.FILE_SHARED | VmaStatus.FILE_PRIVATE)
    if is_file and mapping.path.endswith(DELETED) and not mapping.path.startswith("/memfd:"):
        link = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        reason, option = why_lost(pid, os.readlink(link), os.stat(link), options)
        if reason:
            findings.add(pid, where, reason, option)


def guards_of(pid: int, mapping: Mapping) -> list[tuple[int, int]] | None:
    """(start, end) of what is guarded now: the flag stays when guards are taken out. None: the kernel cannot tell."""
    try:
        return list(guard_pages(pid, mapping.start, mapping.end))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
        return None


def kind_of(mapping: Mapping) -> int:
    """The bit of VmaStatus that says where contents come from."""
    if mapping.path in ("[vdso]", "[vsyscall]") or mapping.path.startswith("[vvar"):
        return {"[vdso]": VmaStatus.VDSO, "[vsyscall]": VmaStatus.VSYSCALL}.get(mapping.path, VmaStatus.VVAR)
    if mapping.path.startswith("/SYSV") and mapping.path.endswith(DELETED):
        return VmaStatus.SYSVIPC
    if mapping.path == "/[aio]" + DELETED:
        return VmaStatus.AIORING
    if mapping.path.startswith("/") and not _is_shared_anonymous(mapping) and mapping.path != HUGE:
        return VmaStatus.FILE_SHARED if mapping.is_shared else VmaStatus.FILE_PRIVATE
    return VmaStatus.ANON_SHARED if mapping.is_shared else VmaStatus.ANON_PRIVATE


def _is_shared_anonymous(mapping: Mapping) -> bool:
    return mapping.path == "/dev/zero" + DELETED and mapping.is_shared


def vmas(pid: int, mappings: Sequence[Mapping], files: PathFiles) -> list[Vma]:
    """All mappings with their messages, and behind them one for each run of guard pages. Ours are left out."""
    known: dict[tuple[object, ...], int] = {}
    theirs = [mapping for mapping in _joined(mappings) if not is_canary(mapping)]
    found = [Vma(mapping, _entry(pid, mapping, files, known)) for mapping in theirs]
    for mapping in mappings:
        for start, end in (guards_of(pid, mapping) or ()) if "gu" in mapping.flags else ():
            entry = VmaEntry(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, status=VmaStatus.GUARD, fd=-1)
            found.append(Vma(mapping, entry))
    return found


def _joined(mappings: Sequence[Mapping]) -> list[Mapping]:
    """What the kernel has as [vvar] and [vvar_vclock] (Linux 6.13) is one mapping in an image."""
    found: list[Mapping] = []
    for mapping in mappings:
        last = found[-1] if found and mapping.path.startswith("[vvar") else None
        if last is not None and last.path.startswith("[vvar") and last.end == mapping.start:
            found[-1] = last._replace(end=mapping.end)
        else:
            found.append(mapping)
    return found


def is_shared_memory(vma: VmaEntry) -> bool:
    """Whether it is anonymous memory that processes share, and no System V segment."""
    return vma.status & (VmaStatus.ANON_SHARED | VmaStatus.SYSVIPC) == VmaStatus.ANON_SHARED


def _file_id(pid: int, mapping: Mapping, files: PathFiles, known: dict[tuple[object, ...], int]) -> int:
    """The id of a mapped file. Most have several mappings, and are looked at once."""
    flags = _open_flags(mapping)
    key = mapping.device, mapping.inode, mapping.path, flags
    if key not in known:
        known[key] = files.path_file(pid, f"map_files/{mapping.start:x}-{mapping.end:x}", flags)
    return known[key]


def _entry(pid: int, mapping: Mapping, files: PathFiles, known: dict[tuple[object, ...], int]) -> VmaEntry:
    kind = kind_of(mapping)
    status = (0 if kind == VmaStatus.VSYSCALL else VmaStatus.REGULAR) | kind
    flags = MAP_SHARED if mapping.is_shared else MAP_DROPPABLE if "dp" in mapping.flags else MAP_PRIVATE
    shmid, offset = 0, mapping.offset
    if kind & (VmaStatus.FILE_SHARED | VmaStatus.FILE_PRIVATE):
        status |= VmaStatus.MEMFD if mapping.path.startswith("/memfd:") else 0
        shmid = _file_id(pid, mapping, files, known)
    elif kind in (VmaStatus.ANON_SHARED, VmaStatus.SYSVIPC):
        flags |= MAP_ANONYMOUS
        status |= VmaStatus.ANON_SHARED  # criu attaches no segment without it
        shmid = mapping.inode + SHARED_IDS if kind == VmaStatus.ANON_SHARED else mapping.inode
    else:
        status |= {"[heap]": VmaStatus.HEAP, "[stack]": VmaStatus.STACK}.get(mapping.path, 0)
        status |= VmaStatus.ANON_PRIVATE if kind & VmaStatus.KERNELS else 0
        flags |= MAP_ANONYMOUS
        offset = 0
    for name, bit in MAP_BY_FLAG.items():
        flags |= bit if name in mapping.flags else 0
    if mapping.path == HUGE:
        size = os.stat(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}").st_blksize
        flags |= (size.bit_length() - 1) << MAP_HUGE_SHIFT
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
    auxv = procfs.read(task.pid, "auxv")[:MOST_AUXV]
    return MmEntry(
        mm_start_code=stat.start_code, mm_end_code=stat.end_code, mm_start_data=stat.start_data,
        mm_end_data=stat.end_data, mm_start_stack=stat.start_stack, mm_start_brk=stat.start_brk,
        mm_brk=remote.call("brk", 0), mm_arg_start=stat.arg_start, mm_arg_end=stat.arg_end,
        mm_env_start=stat.env_start, mm_env_end=stat.env_end, exe_file_id=exe_id,
        mm_saved_auxv=list(struct.unpack(f"<{len(auxv) // 8}Q", auxv)), vmas=[vma.entry for vma in found],
        dumpable=remote.call("prctl", PR_GET_DUMPABLE), aios=_rings(remote, found),
        thp_disabled=_thp_disabled(remote) or None,
    )  # fmt: skip


def _thp_disabled(remote: Remote) -> bool:
    try:
        return bool(remote.call("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
