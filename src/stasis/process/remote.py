# SPDX-License-Identifier: Apache-2.0
"""System calls inside a stopped task, one at a time, with a stop where each one is left.

No program is injected. The only instructions that we bring along sit on a page of our own in the task:

    syscall
    jmp .          a task whose tracer dies in the middle of a call runs in circles here, and does no harm

so that whoever takes over (`guardian.py`) finds the task unharmed and puts its registers back. For the first calls,
which make that page, and the last one, which takes it out, the same stands in place of an instruction of the task's
own. The pages behind hold arguments and results. Signals are blocked meanwhile; they stay queued and find the task as
it was.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from stasis.errors import StasisError, UnsupportedError
from stasis.linux import ptrace
from stasis.linux.syscalls import NUMBERS
from stasis.linux.taskmem import TaskMemory
from stasis.process.journal import INSTRUCTION

if TYPE_CHECKING:
    from stasis.linux.procfs import Mapping
    from stasis.linux.ptrace import Stop
    from stasis.process.journal import Journal

__all__ = ["ALL_BLOCKED", "CODE_BYTES", "PAGE", "SCRATCH_BYTES", "Range", "Remote", "RemoteThread", "find_hole"]

PAGE = 4096
SCRATCH_BYTES = 64 << 10
CODE_BYTES = PAGE
"""Our code page, right before the scratch pages."""
CODE = b"\x0f\x05\xeb\xfe"
SYSCALL = b"\x0f\x05"
ALL_BLOCKED = (1 << 64) - 1
LOWEST_ADDRESS = 1 << 16
USER_END = (1 << 47) - PAGE  # arch/x86/include/asm/page_64_types.h, TASK_SIZE_MAX with four levels
GAP = 1 << 20
HIGHEST_ERRNO = 4095
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

RSEQ_CS_OFFSET = 8  # include/uapi/linux/rseq.h
RSEQ_CS = struct.Struct("<IIQQQ")
"""version, flags, start_ip, post_commit_offset, abort_ip."""

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 2, 0x10, 0x20, 0x100000


class Range(Protocol):
    """Addresses from `start` to `end`."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


DISPATCHED = "gets its system calls as signals (PR_SET_SYSCALL_USER_DISPATCH), which no image can say"


class RemoteThread:
    """One stopped thread: runs system calls, and is put back as it was by `restore`."""

    def __init__(self, tid: int, journal: Journal | None = None, pages: int = 0) -> None:
        """`journal` lets a guardian put the thread back should this process die. `pages`: ours in its process."""
        self.tid = tid
        self.registers = ptrace.registers(tid)
        self.fpu = ptrace.fpu_state(tid)
        self.signal_mask = ptrace.signal_mask(tid)
        self.slot = -1
        self._journal = journal
        self._pages = pages
        self._touched = False
        self.held_back: list[int] = []
        """Stop signals that came during calls; they cannot be blocked and are sent again by `restore`."""

    def call(self, place: int, name: str, *arguments: int) -> int:
        """Run a system call through the `syscall` instruction at `place`. OSError with its errno and name."""
        self.begin(place)
        values = self.registers.copy()
        values.rip, values.rax = place, NUMBERS[name]
        values.orig_rax = ALL_BLOCKED  # -1: no system call that a signal could restart
        if self._journal is not None:
            values.r15 = self._journal.cookie
        padded = (*arguments, *(0,) * (6 - len(arguments)))
        values.rdi, values.rsi, values.rdx, values.r10, values.r8, values.r9 = (
            value & ALL_BLOCKED for value in padded
        )
        ptrace.set_registers(self.tid, values)
        self._run()
        result = ptrace.registers(self.tid).rax
        if result > ALL_BLOCKED - HIGHEST_ERRNO:
            number = ALL_BLOCKED + 1 - result
            raise OSError(number, f"{name} in thread {self.tid}: {os.strerror(number)}")
        return int(result)

    def begin(self, place: int) -> None:
        """Note in the journal that the thread is about to be touched, and block its signals. UnsupportedError if it
        gets its system calls as signals: with ours it would lose the handler for them."""
        if self._touched:
            return
        if ptrace.dispatches_system_calls(self.tid):
            raise UnsupportedError(f"thread {self.tid} {DISPATCHED}", hint="nothing was done to it")
        if self._journal is not None:
            self.slot = self._journal.enter(self.tid, self.registers, self.signal_mask, place, self._pages)
        self._touched = True
        ptrace.set_signal_mask(self.tid, ALL_BLOCKED)

    def _run(self) -> None:
        """Let the task enter the system call, and leave it."""
        for _ in range(2):
            ptrace.cont_to_system_call(self.tid)
            while not (stop := self._wait()).is_system_call:
                if stop.signal in FAULTS and not stop.event:  # all that is not forced by an instruction is blocked
                    raise StasisError(f"thread {self.tid} cannot run a system call: {signal.strsignal(stop.signal)}",
                                      errno=errno.EFAULT)  # fmt: skip
                if not stop.event:
                    self._hold_back(stop.signal)
                ptrace.cont_to_system_call(self.tid)

    def _wait(self) -> Stop:
        stop = ptrace.wait_for_stop(self.tid)
        if stop.exited is not None:
            raise StasisError(f"thread {self.tid} was killed while it was looked at", errno=errno.ESRCH)
        return stop

    def _stop_anew(self) -> None:
        """Stop where signals are looked at: only there does the kernel restart a system call that we interrupted."""
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        while not (stop := self._wait()).event:
            self._hold_back(stop.signal)
            ptrace.cont(self.tid)

    def _hold_back(self, number: int) -> None:
        self.held_back.append(number)
        if self._journal is not None:
            self._journal.hold_back(self.slot, number)

    def restore(self, then: Callable[[], None] = lambda: None) -> None:
        """Put registers and mask back, and send again what was held back. `then`: what is in the journal, too."""
        if not self._touched:
            return
        self._stop_anew()
        ptrace.set_registers(self.tid, self.registers)
        ptrace.set_signal_mask(self.tid, self.signal_mask)  # behind them: a handler must not begin on our page
        then()
        if self._journal is not None:
            self._journal.leave(self.slot)
        self._touched = False
        for number in self.held_back:
            os.kill(self.tid, number)
        self.held_back.clear()


class Remote:
    """A stopped process with our pages in it; a context manager that takes them out again.

    `scratch` is the address of `SCRATCH_BYTES` bytes for arguments and results, `fd`-less and readable by the task.
    """

    def __init__(
        self, pid: int, mappings: Sequence[Mapping], journal: Journal | None = None, avoid: Sequence[Range] = ()
    ) -> None:
        """`mappings` as /proc tells them, from which free addresses are chosen, and not from `avoid`. The leader must
        be stopped."""
        self.pid = pid
        self.memory = TaskMemory(pid)
        self.leader = RemoteThread(pid, journal)
        self.code = 0
        self._journal = journal
        self._mappings = mappings
        self._avoid = avoid
        self._threads: dict[int, RemoteThread] = {pid: self.leader}
        self._borrowed = b""
        self._guests: list[Remote] = []
        self._is_guest = False

    @property
    def scratch(self) -> int:
        """Where arguments and results go."""
        return self.code + PAGE

    def __enter__(self) -> Self:
        try:
            self._leave_critical_section(self.leader)
            self._own_syscall = self._find_syscall()
            place = find_hole([*self._mappings, *self._avoid], PAGE + SCRATCH_BYTES)
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
            self._borrow()
            self._note(place, PAGE + SCRATCH_BYTES)
            self.code = self.leader.call(
                self._own_syscall, "mmap", place, PAGE + SCRATCH_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0
            )
            self._make_executable()
            self.call("getpid")  # it stands on our page from here on
            self._give_back()
        except BaseException:
            self.close()
            raise
        return self

    def _make_executable(self) -> None:
        """Put `CODE` on our page. A process may be denied to make executable what it could write (PR_SET_MDWE): then
        the page is mapped anew, and the tracer writes to it."""
        protection = PROT_READ | PROT_EXEC
        self.memory.write(self.code, CODE)
        try:
            self.leader.call(self._own_syscall, "mprotect", self.code, PAGE, protection)
        except PermissionError:
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
            self.leader.call(self._own_syscall, "mmap", self.code, PAGE, protection, flags, -1, 0)
            self.memory.write(self.code, CODE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take our pages out, put all registers back."""
        try:
            for guest in self._guests:
                guest.close()
            if self.code and not self._is_guest:
                for thread in self._threads.values():
                    if thread is not self.leader:
                        thread.restore()
                self._borrow()
                self.leader.call(self._own_syscall, "munmap", self.code, PAGE + SCRATCH_BYTES)
                self._note(0, 0)
                self.code = 0
        finally:
            for thread in self._threads.values():
                thread.restore(self._give_back if thread is self.leader else lambda: None)
            self.memory.close()

    def _note(self, pages: int, length: int) -> None:
        if self._journal is not None:
            self._journal.move(self.leader.slot, pages, length)

    def _borrow(self) -> None:
        """Have `CODE` stand where the system call instruction of the process's own is."""
        if self._journal is None:
            return
        self.leader.begin(self._own_syscall)
        self._borrowed = self.memory.read(self._own_syscall, INSTRUCTION)
        self._journal.change(self.leader.slot, self._own_syscall, self._borrowed)
        try:
            self.memory.write(self._own_syscall, CODE)
        except OSError:  # a kernel that is told to forbid it (proc_mem.force_override): then a death here does harm
            self._journal.change(self.leader.slot, 0, b"")
            self._borrowed = b""

    def _give_back(self) -> None:
        if self._journal is not None and self._borrowed:
            self.memory.write(self._own_syscall, self._borrowed)
            self._journal.change(self.leader.slot, 0, b"")
            self._borrowed = b""

    def _find_syscall(self) -> int:
        """A `syscall` instruction that the process has: in its vdso, else in whatever it may execute."""
        executable = [mapping for mapping in self._mappings if mapping.permissions[2] == "x"]
        for mapping in sorted(executable, key=lambda mapping: mapping.path != "[vdso]"):
            if mapping.start >= USER_END:
                continue  # the old vsyscall page
            for start in range(mapping.start, mapping.end, 1 << 20):
                portion = self.memory.read(start, min(1 << 20, mapping.end - start))
                found = portion.find(SYSCALL, 0, len(portion) - INSTRUCTION)
                if found >= 0:
                    return start + found
        raise StasisError(f"process {self.pid} has no system call instruction in its memory")

    def _leave_critical_section(self, thread: RemoteThread) -> None:
        """A thread that was interrupted in a restartable sequence goes on at its abort handler (rseq(2)). The kernel
        would see to that, but finds the thread on our page, and takes the sequence to be over."""
        found = ptrace.rseq_configuration(thread.tid)
        if found is None or not found.pointer:
            return
        try:
            (section,) = struct.unpack("<Q", self.memory.read(found.pointer + RSEQ_CS_OFFSET, 8))
            if not section:
                return
            _, _, start, length, abort = RSEQ_CS.unpack(self.memory.read(section, RSEQ_CS.size))
        except OSError:
            return  # the kernel ends the process for it when it runs on
        if start <= thread.registers.rip < start + length:
            thread.registers.rip = abort

    def beside(self, pid: int) -> Remote:
        """For another stopped process with the same address space. Our pages are there, and stay until this one is
        closed, which closes that one, too."""
        guest = Remote(pid, self._mappings, self._journal)
        guest.code, guest._is_guest = self.code, True
        self._guests.append(guest)
        return guest

    def moved(self, mappings: Sequence[Mapping]) -> None:
        """The process has other memory than it had; our pages are where they were."""
        self._mappings = [mapping for mapping in mappings if mapping.start != self.code]
        self._own_syscall = self._find_syscall()

    # -- calls --------------------------------------------------------------------------------------

    def thread(self, tid: int) -> RemoteThread:
        """Another stopped thread of the process."""
        if tid not in self._threads:
            self._threads[tid] = RemoteThread(tid, self._journal, self.code)
            self._leave_critical_section(self._threads[tid])
        return self._threads[tid]

    def call(self, name: str, *arguments: int, tid: int | None = None) -> int:
        """Run a system call in the leader, or in another thread. OSError with its errno."""
        thread = self.leader if tid is None else self.thread(tid)
        return thread.call(self.code, name, *arguments)

    def open(self, name: str, *arguments: int) -> int:
        """The same for a call that gives the process a descriptor, the lowest that is free. `close` takes it away, or
        the guardian."""
        taken = {int(number) for number in os.listdir(f"/proc/{self.pid}/fd")}
        expected = next(number for number in range(len(taken) + 1) if number not in taken)
        if self._journal is not None:
            self._journal.open(self.leader.slot, expected)
        try:
            found = self.call(name, *arguments)
        except OSError:
            self._forget(expected)
            raise
        if found != expected:
            self.call("close", found)
            self._forget(expected)
            raise StasisError(f"process {self.pid} shares its descriptors with one that runs", errno=errno.EBUSY)
        return found

    def close_fd(self, fd: int) -> None:
        """Close a descriptor that `open` gave."""
        self.call("close", fd)
        self._forget(fd)

    def _forget(self, fd: int) -> None:
        if self._journal is not None:
            self._journal.close(self.leader.slot, fd)

    def put(self, data: bytes, at: int = 0) -> int:
        """Copy data to the scratch pages; its address there."""
        if at + len(data) > SCRATCH_BYTES:
            raise ValueError(f"{len(data)} bytes at {at} do not fit the scratch pages")
        self.memory.write(self.scratch + at, data)
        return self.scratch + at

    def get(self, length: int, at: int = 0) -> bytes:
        """What the scratch pages hold."""
        return self.memory.read(self.scratch + at, length)

    def get_words(self, format_: str, at: int = 0) -> tuple[int, ...]:
        """The same, unpacked as struct does it."""
        return struct.unpack(format_, self.get(struct.calcsize(format_), at))


def find_hole(ranges: Sequence[Range], length: int) -> int:
    """Address of `length` free bytes with a distance to all ranges, so that the kernel joins it with none."""
    taken = sorted((each.start, each.end) for each in ranges if each.start < USER_END)
    position = LOWEST_ADDRESS
    best: tuple[int, int] = (0, 0)
    for start, end in [*taken, (USER_END, USER_END)]:
        best = max(best, (start - position, position))
        position = max(position, end)
    room, start = best
    if room < length + 2 * GAP:
        raise StasisError("the address space has no room left", errno=errno.ENOMEM)
    return (start + room // 2) // PAGE * PAGE
