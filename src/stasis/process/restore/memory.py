# SPDX-License-Identifier: Apache-2.0
"""Giving a process the memory of another one: all of its own goes, then everything is mapped and filled as it was.

Only our pages stay meanwhile, at addresses that are free in both layouts. The order is that of CRIU's restorer.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError
from stasis.linux import procfs, ptrace
from stasis.process.dump.mm import MAP_ANONYMOUS, MAP_BY_FLAG, MAP_SHARED, VmaStatus
from stasis.process.images import ImageSet, MemoryReader, PageSource
from stasis.process.remote import CODE_BYTES, PAGE, SCRATCH_BYTES, Range, Remote
from stasis.process.seals import seal

if TYPE_CHECKING:
    from stasis.process.images.schema.memory import MmEntry, VmaEntry
    from stasis.process.restore.outfit import Ready

__all__ = ["replace_memory"]

PROT_READ, PROT_WRITE = 1, 2
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
USER_END = (1 << 47) - PAGE
AT_FDCWD = -100
RSEQ_FLAG_UNREGISTER = 1
ARCH_MAP_VDSO_64 = 0x2003  # arch/x86/include/uapi/asm/prctl.h
PR_SET_MM, PR_SET_MM_MAP = 35, 14  # include/uapi/linux/prctl.h
PR_SET_THP_DISABLE = 41
MM_MAP = struct.Struct("<12QIi")  # struct prctl_mm_map
IOVEC = struct.Struct("<QQ")
MOST_VECTORS = 1024  # UIO_MAXIOV
LARGEST_READ = 64 << 20
LOCKED = MAP_BY_FLAG["lo"]
MADV_GUARD_INSTALL = 102
OTHERS = VmaStatus.SYSVIPC | VmaStatus.AIORING
SPECIAL = VmaStatus.KERNELS | VmaStatus.GUARD | OTHERS
FROM_FILE = VmaStatus.FILE_PRIVATE | VmaStatus.FILE_SHARED


def replace_memory(remote: Remote, mm: MmEntry, ready: Ready, chain: list[ImageSet]) -> None:
    """Make the memory of the process that of `mm`. What fails leaves a process that can only be ended."""
    _unregister_rseq(remote)
    _unmap_all(remote, ready)
    _map_vdso(remote, mm)
    regular = [vma for vma in mm.vmas if not vma.status & SPECIAL]
    guards = [vma for vma in mm.vmas if vma.status & VmaStatus.GUARD]
    with MemoryReader(chain, remote.pid) as reader:
        filled = {vma.start for vma in regular if vma.start in ready.pieces or _has_pages(vma, reader)}
        for vma in regular:
            _map(remote, vma, ready, fills=vma.start in filled)
        _map_others(remote, mm)
        _fill(remote, [vma for vma in regular if vma.start in filled], reader, ready)
    for vma in guards:
        remote.call("madvise", vma.start, vma.end - vma.start, MADV_GUARD_INSTALL)
    for vma in regular:
        _finish(remote, vma, fills=vma.start in filled)
    _describe(remote, mm, ready)
    seal(remote, mm, chain[0])
    for fd in ready.fds:
        remote.call("close", fd)


def _unregister_rseq(remote: Remote) -> None:
    found = ptrace.rseq_configuration(remote.pid)
    if found is not None and found.pointer:
        remote.call("rseq", found.pointer, found.size, RSEQ_FLAG_UNREGISTER, found.signature)


def _unmap_all(remote: Remote, ready: Ready) -> None:
    """But our pages, and what lies ready."""
    kept = [(place, length) for length, place in ready.pieces.values()]
    position = 0
    for start, length in sorted([*kept, (remote.code, CODE_BYTES + SCRATCH_BYTES), (USER_END, 0)]):
        if start > position:
            remote.call("munmap", position, start - position)
        position = start + length


def _map_vdso(remote: Remote, mm: MmEntry) -> None:
    """Where it was, if this kernel's is laid out like that of the dump."""
    wanted = [vma for vma in mm.vmas if vma.status & (VmaStatus.VDSO | VmaStatus.VVAR)]
    if not wanted:
        return
    remote.call("arch_prctl", ARCH_MAP_VDSO_64, min(vma.start for vma in wanted))
    now = procfs.mappings(remote.pid, flags=False)
    remote.moved(now)
    there = [mapping for mapping in now if mapping.path.startswith(("[vvar", "[vdso"))]
    code = {mapping.start for mapping in there if mapping.path == "[vdso]"}
    if _ranges(there) != _ranges(wanted) or code != {vma.start for vma in wanted if vma.status & VmaStatus.VDSO}:
        raise UnsupportedError(
            f"this kernel's vdso is laid out in another way than that of process {remote.pid} when it was dumped",
            hint="restore it on the kernel that it was dumped on",
        )


def _ranges(pieces: Sequence[Range]) -> list[tuple[int, int]]:
    """(start, end) of what they cover; images have [vvar] in one piece or in two."""
    found: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if found and found[-1][1] == piece.start:
            found[-1] = (found[-1][0], piece.end)
        else:
            found.append((piece.start, piece.end))
    return found


def _has_pages(vma: VmaEntry, reader: MemoryReader) -> bool:
    return not vma.flags & MAP_SHARED and any(True for _ in reader.sources(vma.start, vma.end))


def _map_others(remote: Remote, mm: MmEntry) -> None:
    """What mmap(2) does not make; their modules are for those who have such."""
    if any(vma.status & VmaStatus.SYSVIPC for vma in mm.vmas):
        from stasis.process.sysvshm import attach

        attach(remote, [vma for vma in mm.vmas if vma.status & VmaStatus.SYSVIPC])
    if mm.aios:
        from stasis.process.aio import make_rings

        make_rings(remote, mm.aios)


def _map(remote: Remote, vma: VmaEntry, ready: Ready, *, fills: bool) -> None:
    """Map it where it was, writable as long as it has to be filled; else a large reserve would count as memory."""
    if vma.start in ready.pieces:
        length, place = ready.pieces[vma.start]
        remote.call("mremap", place, length, vma.end - vma.start, MREMAP_MAYMOVE | MREMAP_FIXED, vma.start)
        if vma.prot & ~(PROT_READ | PROT_WRITE):
            remote.call("mprotect", vma.start, vma.end - vma.start, vma.prot | PROT_WRITE)
        return
    fd = -1
    if vma.status & FROM_FILE:
        fd = ready.file_fd[vma.shmid, vma.fdflags or 0]
    elif vma.status & VmaStatus.ANON_SHARED:
        fd = ready.shared_fd[vma.shmid]
    flags = (vma.flags & ~(LOCKED | MAP_ANONYMOUS)) | MAP_FIXED_NOREPLACE | (MAP_ANONYMOUS if fd < 0 else 0)
    protection = vma.prot | PROT_WRITE if fills else vma.prot
    remote.call("mmap", vma.start, vma.end - vma.start, protection, flags, fd, vma.pgoff if fd >= 0 else 0)


def _fill(remote: Remote, regular: list[VmaEntry], reader: MemoryReader, ready: Ready) -> None:
    """Have the process read its pages from the image, many runs with one call; but those that lay ready."""
    opened: dict[int, int] = {}
    batch: list[PageSource] = []
    for vma in regular:
        for source in reader.sources(vma.start + ready.pieces.get(vma.start, (0, 0))[0], vma.end):
            if batch and not _continues(batch, source):
                _read(remote, ready, opened, batch)
                batch = []
            batch.append(source)
    if batch:
        _read(remote, ready, opened, batch)
    for fd in set(opened.values()) - set(ready.pages_fd.values()):
        remote.call("close", fd)


def _continues(batch: list[PageSource], source: PageSource) -> bool:
    last = batch[-1]
    size = sum(each.end - each.start for each in batch)
    follows = source.fd == last.fd and source.offset == last.offset + last.end - last.start
    return follows and len(batch) < MOST_VECTORS and size + source.end - source.start <= LARGEST_READ


def _read(remote: Remote, ready: Ready, opened: dict[int, int], batch: list[PageSource]) -> None:
    local = batch[0].fd
    if local not in opened and (known := _inherited(ready, local)) >= 0:
        opened[local] = known
    elif local not in opened:
        path = remote.put(f"/proc/{os.getpid()}/fd/{local}".encode() + b"\0")
        opened[local] = remote.call("openat", AT_FDCWD, path, os.O_RDONLY | os.O_CLOEXEC)
    offset = batch[0].offset
    vectors = [(source.start, source.end - source.start) for source in batch]
    while vectors:
        at = remote.put(b"".join(IOVEC.pack(*vector) for vector in vectors))
        done = remote.call("preadv", opened[local], at, len(vectors), offset, 0)
        offset += done
        vectors = _rest(vectors, done)


def _inherited(ready: Ready, local: int) -> int:
    """The process's own descriptor for one of our files; -1 where it has none."""
    status = os.fstat(local)
    return ready.pages_fd.get((status.st_dev, status.st_ino), -1)


def _rest(vectors: list[tuple[int, int]], done: int) -> list[tuple[int, int]]:
    """What a short read left."""
    rest = []
    for start, length in vectors:
        taken = min(done, length)
        done -= taken
        if taken < length:
            rest.append((start + taken, length - taken))
    return rest


def _finish(remote: Remote, vma: VmaEntry, *, fills: bool) -> None:
    length = vma.end - vma.start
    if fills and not vma.prot & PROT_WRITE:
        remote.call("mprotect", vma.start, length, vma.prot)
    for advice in range(64):
        if (vma.madv or 0) >> advice & 1:
            remote.call("madvise", vma.start, length, advice)
    if vma.flags & LOCKED:
        remote.call("mlock", vma.start, length)


def _describe(remote: Remote, mm: MmEntry, ready: Ready) -> None:
    """Tell the kernel where program, heap, arguments and so on lie, and which program it is."""
    auxv = struct.pack(f"<{len(mm.mm_saved_auxv)}Q", *mm.mm_saved_auxv)
    at = remote.put(auxv, MM_MAP.size)
    exe = ready.file_fd[mm.exe_file_id, os.O_RDONLY]
    if os.path.samefile(f"/proc/{remote.pid}/exe", f"/proc/{remote.pid}/fd/{exe}"):
        exe = -1  # it is this program already, and the kernel changes none that is mapped (EBUSY)
    fields = MM_MAP.pack(
        mm.mm_start_code, mm.mm_end_code, mm.mm_start_data, mm.mm_end_data, mm.mm_start_brk, mm.mm_brk,
        mm.mm_start_stack, mm.mm_arg_start, mm.mm_arg_end, mm.mm_env_start, mm.mm_env_end, at, len(auxv), exe,
    )  # fmt: skip
    remote.call("prctl", PR_SET_MM, PR_SET_MM_MAP, remote.put(fields), MM_MAP.size, 0)
    if mm.thp_disabled:
        remote.call("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)
