# SPDX-License-Identifier: Apache-2.0
"""Memory that nobody may change any more (mseal(2), Linux 6.10): which it was, and sealing it again when all is in it.

CRIU's images have no place for it. An image of our own, `stasis-seals-PID.img`, has the ranges; other readers do not
look for it, and bring the memory back without seals.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError
from stasis.linux import procfs
from stasis.process.images.damage import damaged
from stasis.process.images.schema.memory import SealEntry

if TYPE_CHECKING:
    from stasis.linux.procfs import Mapping
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.memory import MmEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.remote import Remote

__all__ = ["SEALED", "has_sealed_system", "refuse_sealed_system", "seal", "write_seals"]

SEALED = "sl"
"""Among the VmFlags of /proc/PID/smaps."""
SYSTEM = "[v"
"""What the kernel maps by itself has names like [vdso]."""


def write_seals(pid: int, layout: Sequence[Mapping], out: ImageSetWriter) -> None:
    """Note which memory of a process is sealed."""
    for mapping in layout:
        if SEALED in mapping.flags and not mapping.path.startswith(SYSTEM):
            out.write("stasis-seals", SealEntry(start=mapping.start, end=mapping.end), number=pid)


def seal(remote: Remote, mm: MmEntry, images: ImageSet) -> None:
    """Seal what was sealed. Its mappings, contents and protection must be there: nothing can follow."""
    there = {(vma.start, vma.end) for vma in mm.vmas}
    for entry in images.messages("stasis-seals", remote.pid):
        if (entry.start, entry.end) not in there:
            path = images.file_path("stasis-seals", remote.pid)
            raise damaged(path, 0, f"there is no memory from {entry.start:#x} to {entry.end:#x} that could be sealed")
        try:
            remote.call("mseal", entry.start, entry.end - entry.start, 0)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            raise UnsupportedError(f"memory of process {remote.pid} was sealed, and this kernel cannot seal any",
                                   hint="restore it on Linux 6.10 or later") from error  # fmt: skip


def has_sealed_system(smaps: bytes) -> bool:
    """Whether what the kernel maps into each process is sealed (CONFIG_MSEAL_SYSTEM_MAPPINGS, Linux 6.16)."""
    _, found, behind = smaps.partition(b"[vdso]\n")
    flags = behind.partition(b"VmFlags:")[2].partition(b"\n")[0]
    return bool(found) and SEALED.encode() in flags.split()


def refuse_sealed_system() -> None:
    """Where it is, no process can be given the vdso of another one. Raises UnsupportedError."""
    if has_sealed_system(procfs.read(procfs.SELF, "smaps")):
        raise UnsupportedError("this kernel seals the vdso of every process, so that none can be given that of another",
                               hint="restore on a kernel without CONFIG_MSEAL_SYSTEM_MAPPINGS")  # fmt: skip
