# SPDX-License-Identifier: Apache-2.0
"""System V shared memory of a tree: segments come back with their ids, where they are gone.

A segment does not belong to processes and outlives them. One that is there at the restore and that others use is what
it has become since; one that nobody uses gets the contents of the dump, and one that is gone is made again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stasis.errors import BusyError, PermissionDeniedError
from stasis.linux import libc
from stasis.linux import sysvshm as kernel
from stasis.linux.sysvshm import SHM_DEST, Segment
from stasis.linux.taskmem import TaskMemory
from stasis.process.dump.mm import PROT, VmaStatus, kind_of
from stasis.process.guardian import Guardian
from stasis.process.images.damage import damaged
from stasis.process.images.memory import MemoryReader
from stasis.process.images.schema.ipc import IpcDescEntry, IpcShmEntry
from stasis.process.journal import Journal
from stasis.process.spaces import inside
from stasis.process.traces import Traces, remove_made, segment_made

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stasis.linux.procfs import Mapping
    from stasis.process.dump.shared import Known
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.memory import VmaEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.identities import Identities
    from stasis.process.remote import Remote

__all__ = ["attach", "check_segments", "make_segments", "marked", "segments_of", "write_segments"]

PAGE = 4096
SYS_SHMAT, SYS_SHMDT = 30, 67
SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000
PROT_WRITE, PROT_EXEC = 2, 4
LARGEST_READ = 1 << 30


def check_segments(pid: int, mappings: Sequence[Mapping], findings: Findings) -> None:
    """Note which segments of a process cannot be kept."""
    mapped: dict[tuple[int, int], int] = {}
    for mapping in mappings:
        if kind_of(mapping) == VmaStatus.SYSVIPC:
            key = mapping.inode, mapping.start - mapping.offset
            mapped[key] = mapped.get(key, 0) + mapping.length
            if "ht" in mapping.flags:
                findings.add(pid, f"System V segment {mapping.inode}", "huge pages are not supported for it")
    with inside("ipc", pid):
        known = kernel.segments() if mapped else {}
    for (number, _), length in mapped.items():
        if number not in known:
            findings.add(pid, f"System V segment {number}", "it is of another IPC namespace than ours")
        elif length != -(-known[number].size // PAGE) * PAGE:
            findings.add(pid, f"System V segment {number}", "only a part of it is mapped")


def write_segments(
    mapped: dict[int, tuple[int, Mapping]], namespace: int, out: ImageSetWriter, identities: Identities | None = None,
    known: Known | None = None,
) -> int:
    """Write the segments of which something is mapped: by id, a process that has it, and where. Returns pages.
    `identities`: those of the user namespace that owners are to be named in. `known`: what the set before has."""
    from stasis.process.dump.pages import write_shared

    pages = 0
    for number, (pid, mapping) in mapped.items():
        found = kernel.segments()[number]
        desc = IpcDescEntry(key=found.key & 0xFFFFFFFF, uid=found.uid, gid=found.gid, cuid=found.cuid, cgid=found.cgid,
                            mode=found.mode, id=number)  # fmt: skip
        if identities is not None:
            desc.uid, desc.cuid = identities.uid(desc.uid), identities.uid(desc.cuid)
            desc.gid, desc.cgid = identities.gid(desc.gid), identities.gid(desc.cgid)
        out.write("ipcns-shm", IpcShmEntry(desc=desc, size=found.size, in_pagemaps=True), number=namespace)
        memory = TaskMemory(pid)
        try:
            last = memory.read(mapping.start - mapping.offset + (found.size - 1) // PAGE * PAGE, PAGE)
        finally:
            memory.close()
        pages += write_shared(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", number, out, last, known)
    return pages


@contextmanager
def segments_of(images: ImageSet, number: int, chain: list[ImageSet]) -> Iterator[None]:
    """Have the segments of namespace `number` there for the processes that will map them; those that were made go again
    when the restore fails (`traces.py`). A guardian of their own: they are there before any process is."""
    wanted, creator = list(_segments(images, number)), os.getpid()

    def end_marked() -> None:
        for segment in wanted:
            if segment.mode & SHM_DEST:
                remove_made(segment.id, creator)

    with Guardian(Journal(), Traces.undo_all, end_marked):
        made: list[Segment] = []
        for segment in wanted:
            segment_made(segment.id)
            _bring(segment, made, chain)
        yield
        for segment in made:
            if segment.mode & SHM_DEST:
                kernel.remove(segment.id)


def make_segments(images: ImageSet, number: int, chain: list[ImageSet]) -> None:
    """Have all segments of namespace `number` in one that goes if the restore fails; see `marked`."""
    for segment in _segments(images, number):
        _bring(segment, [], chain)


def marked(images: ImageSet, number: int) -> list[int]:
    """Ids of the segments of a namespace that go when nobody has them mapped any more."""
    return [segment.id for segment in _segments(images, number) if segment.mode & SHM_DEST]


def _segments(images: ImageSet, number: int) -> Iterable[Segment]:
    for entry in images.messages("ipcns-shm", number) if images.has("ipcns-shm", number) else ():
        desc = entry.desc
        if desc.id > 0x7FFFFFFF or not entry.in_pagemaps or entry.hugetlb_flag:
            raise damaged(images.file_path("ipcns-shm", number), 0, f"segment {desc.id} cannot be restored")
        key = desc.key - (1 << 32) if desc.key >> 31 else desc.key
        yield Segment(key, desc.id, desc.mode, entry.size, 0, desc.uid, desc.gid, desc.cuid, desc.cgid)


def _bring(wanted: Segment, made: list[Segment], chain: list[ImageSet]) -> None:
    there = kernel.segments().get(wanted.id)
    if there is not None:
        if (there.key, there.size) != (wanted.key, wanted.size):
            raise BusyError(f"the System V segment {wanted.id} is another one than the dumped processes had",
                            hint="remove it (ipcrm -m), or restore where its id is free")  # fmt: skip
        if not there.attached:
            _fill(wanted, chain)
        return
    try:
        kernel.make(wanted)
    except PermissionError as error:
        raise PermissionDeniedError("choosing the id of a System V segment needs CAP_CHECKPOINT_RESTORE",
                                    hint="run as root") from error  # fmt: skip
    except FileExistsError as error:
        raise BusyError(f"the System V segment {wanted.id} with the key {wanted.key:#x} cannot be made: id or key are "
                        "taken", hint="remove what has them (ipcrm), or restore where they are free",
                        errno=errno.EEXIST) from error  # fmt: skip
    made.append(wanted)
    _fill(wanted, chain)


def _fill(wanted: Segment, chain: list[ImageSet]) -> None:
    address = libc.check(libc.syscall(SYS_SHMAT, wanted.id, 0, 0, 0, 0, 0), "shmat")
    try:
        size = -(-wanted.size // mmap.PAGESIZE) * mmap.PAGESIZE
        ctypes.memset(address, 0, size)
        view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        with MemoryReader(chain, wanted.id, "pagemap-shmem") as reader:
            for source in reader.sources(0, size):
                done = source.start
                while done < source.end:
                    end = min(source.end, done + LARGEST_READ)
                    done += os.preadv(source.fd, [view[done:end]], source.offset + done - source.start)
    finally:
        libc.check(libc.syscall(SYS_SHMDT, address, 0, 0, 0, 0, 0), "shmdt")


def attach(remote: Remote, vmas: Sequence[VmaEntry]) -> None:
    """Map segments into a process, each as a whole, and protect its parts as they were."""
    groups: dict[tuple[int, int], list[VmaEntry]] = {}
    for vma in vmas:
        groups.setdefault((vma.shmid, vma.start - vma.pgoff), []).append(vma)
    for (number, start), parts in groups.items():
        protection = 0
        for part in parts:
            protection |= part.prot
        flags = (0 if protection & PROT_WRITE else SHM_RDONLY) | (SHM_EXEC if protection & PROT_EXEC else 0)
        remote.call("shmat", number, start, flags)
        for part in parts:
            remote.call("mprotect", part.start, part.end - part.start, part.prot & sum(PROT.values()))
