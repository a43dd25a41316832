# SPDX-License-Identifier: Apache-2.0
"""System call filters (seccomp(2)): of each thread a chain of programs, which threads and processes may share.

Filters count for what we do inside a task as well. So they are suspended while it is traced (PTRACE_O_SUSPEND_SECCOMP),
at the dump, at the restore, and by the guardian. They can be installed by whoever may do everything, or will gain
nothing more by exec; a thread gets them before its rights are taken from it.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from stasis.errors import PermissionDeniedError
from stasis.linux import procfs, ptrace
from stasis.process.images.damage import damaged

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.tasks import SeccompFilter, ThreadCoreEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.remote import Remote

__all__ = ["FilterTable", "Filters", "seize_options", "why_lost"]

STRICT, FILTER = 1, 2  # include/uapi/linux/seccomp.h, SECCOMP_MODE_*
SECCOMP_SET_MODE_STRICT, SECCOMP_SET_MODE_FILTER = 0, 1
INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter: code, jt, jf, k
PROGRAM = struct.Struct("<H6xQ")  # struct sock_fprog: instructions, address
BPF_RET = 0x06
ACTION, USER_NOTIFY = 0xFFFF0000, 0x7FC00000
PR_SET_NO_NEW_PRIVS = 38
LONGEST_PROGRAM = 4096  # BPF_MAXINSNS


def mode_of(tid: int) -> int:
    """0, or one of the modes."""
    return int(procfs.status(tid).get("Seccomp", "0"))


def seize_options(tid: int) -> int:
    """What a thread is to be seized with so that its filters do not concern us."""
    suspend = ptrace.PTRACE_O_SUSPEND_SECCOMP if mode_of(tid) else 0
    return ptrace.PTRACE_O_TRACESYSGOOD | suspend


def why_lost(tid: int) -> str:
    """Why the filters of a stopped thread cannot be kept; "" where they can, or there are none."""
    if mode_of(tid) != FILTER:
        return ""
    try:
        found = ptrace.seccomp_filters(tid)
    except PermissionError:
        return "reading system call filters needs CAP_SYS_ADMIN"
    except OSError as error:
        return f"its system call filters cannot be read: {error.strerror}"
    return "another process decides about its system calls" if any(map(_asks, (code for code, _ in found))) else ""


def _asks(code: bytes) -> bool:
    """Whether a filter hands decisions to the holder of a descriptor (SECCOMP_RET_USER_NOTIF)."""
    return any(operation == BPF_RET and value & ACTION == USER_NOTIFY
               for operation, _, _, value in INSTRUCTION.iter_unpack(code))  # fmt: skip


class FilterTable:
    """The filters of a dump: each one once, with the one before it."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, bytes, int], int] = {}

    def last_of(self, tid: int) -> int | None:
        """Number of the newest filter of a stopped thread; None where it has none."""
        number = -1
        for code, flags in ptrace.seccomp_filters(tid) if mode_of(tid) == FILTER else ():
            number = self._numbers.setdefault((number, code, flags), len(self._numbers))
        return number if number >= 0 else None

    def write(self, out: ImageSetWriter) -> None:
        """Write the image, which has one message."""
        out.image("seccomp").begin()
        if not self._numbers:
            return
        from stasis.process.images.schema.tasks import SeccompEntry, SeccompFilter

        found = [SeccompFilter(filter=code, prev=prev if prev >= 0 else None, flags=flags or None)
                 for prev, code, flags in self._numbers]  # fmt: skip
        out.write("seccomp", SeccompEntry(seccomp_filters=found))


class Filters:
    """The filters of an image set."""

    def __init__(self, images: ImageSet) -> None:
        self._path = images.file_path("seccomp")
        self._found: list[SeccompFilter] = [
            found for entry in images.messages("seccomp") for found in entry.seccomp_filters
        ]

    def install(self, remote: Remote, tid: int, thread: ThreadCoreEntry) -> None:
        """Give a thread what it had. Nothing of it counts before the thread is let go."""
        if thread.seccomp_mode not in (STRICT, FILTER):
            return
        kill = ptrace.PTRACE_O_EXITKILL if tid == remote.pid else 0
        try:
            ptrace.set_options(tid, ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP | kill)
        except PermissionError as error:
            raise PermissionDeniedError(f"process {remote.pid} had system call filters, which needs CAP_SYS_ADMIN",
                                        hint="run as root") from error  # fmt: skip
        if thread.seccomp_mode == STRICT:
            remote.call("seccomp", SECCOMP_SET_MODE_STRICT, 0, 0, tid=tid)
            return
        for found in self._chain(thread.seccomp_filter):
            self._add(remote, tid, found)

    def _chain(self, last: int | None) -> list[SeccompFilter]:
        """The oldest first."""
        found: list[SeccompFilter] = []
        number = last
        while number is not None:
            if number >= len(self._found) or len(found) > len(self._found):
                raise damaged(self._path, 0, f"it has no filter {number}, or a circle of them")
            found.append(self._found[number])
            number = self._found[number].prev
        return found[::-1]

    def _add(self, remote: Remote, tid: int, found: SeccompFilter) -> None:
        count, rest = divmod(len(found.filter), INSTRUCTION.size)
        if rest or not 0 < count <= LONGEST_PROGRAM:
            raise damaged(self._path, 0, f"a filter of {len(found.filter)} bytes is none")
        code = remote.put(found.filter, PROGRAM.size)
        program = remote.put(PROGRAM.pack(count, code))
        try:
            remote.call("seccomp", SECCOMP_SET_MODE_FILTER, found.flags or 0, program, tid=tid)
        except OSError as error:
            if error.errno != errno.EACCES:
                raise
            remote.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, tid=tid)
            remote.call("seccomp", SECCOMP_SET_MODE_FILTER, found.flags or 0, program, tid=tid)
