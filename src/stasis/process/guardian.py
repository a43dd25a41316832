# SPDX-License-Identifier: Apache-2.0
"""A process that puts tasks back as they were when the one that looks at them dies, however it does.

The kernel lets a dead tracer's tasks run on with the registers that it had given them. They then run in circles on our
page (see `remote.py`) until the guardian, who learns of the death from a pipe that closes, has seized them and put
their own registers back. A thread whose r15 is not the journal's cookie runs with its own registers already, or still.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from stasis.linux import ptrace
from stasis.linux.taskmem import TaskMemory
from stasis.process.helpers import fork_helper, wait_for_helper
from stasis.process.remote import ALL_BLOCKED, RemoteThread
from stasis.process.seccomp import seize_options

if TYPE_CHECKING:
    from stasis.process.journal import Entry, Journal

__all__ = ["Guardian"]

DONE = b"d"
STOP_SECONDS = 10.0
OF_DUMPS = ("anon_inode:[userfaultfd]", "/memfd:stasis-watch ")
UNBLOCKABLE = 1 << (signal.SIGKILL - 1) | 1 << (signal.SIGSTOP - 1)
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP)


class Guardian:
    """Forked before anything is touched; a context manager that ends it. Fork while there is one thread only."""

    def __init__(
        self, journal: Journal, *undo: Callable[[], object], first: Callable[[], object] = lambda: None
    ) -> None:
        """`undo`: what else is to be done after a death, in the guardian; `first`: what cannot wait."""
        reader, self._writer = os.pipe()
        self.pid = fork_helper()
        if self.pid == 0:
            os.close(self._writer)
            _guard(reader, journal, first, undo)
        os.close(reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed: nobody guards, and nothing is left to guard
            os.write(self._writer, DONE)
        os.close(self._writer)
        wait_for_helper(self.pid)


def _guard(
    reader: int, journal: Journal, first: Callable[[], object], undo: tuple[Callable[[], object], ...]
) -> NoReturn:
    """The guardian's life. Leaves by _exit: nothing of the dumper's is to be cleaned up here."""
    status = 1
    try:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        os.setsid()  # a signal to the dumper's group or terminal is not for us
        if os.read(reader, 1) != DONE:
            first()
            put_back(journal)
            for function in undo:
                function()
        status = 0
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: the guardian failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def put_back(journal: Journal) -> None:
    """Give all threads in the journal what is theirs. A process's thread that takes our pages out comes last."""
    for entry in sorted(journal.entries(), key=lambda entry: entry.length):
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it is gone
            _put_back(entry, journal.cookie)


def _put_back(entry: Entry, cookie: int) -> None:
    _stop(entry.tid)
    try:
        if ptrace.registers(entry.tid).r15 == cookie:
            _take_out(entry)
            ptrace.set_registers(entry.tid, entry.registers)
        if ptrace.signal_mask(entry.tid) | UNBLOCKABLE == ALL_BLOCKED:
            ptrace.set_signal_mask(entry.tid, entry.mask)
        if entry.changed:
            _change_back(entry)
        for number in entry.held_back:
            os.kill(entry.tid, number)
    finally:
        ptrace.detach(entry.tid)


def _take_out(entry: Entry) -> None:
    """What is ours in the process: descriptors, then pages. What was only about to be there is not."""
    if not entry.length:
        return
    thread = RemoteThread(entry.tid)
    try:
        for fd in entry.descriptors:
            with contextlib.suppress(OSError):
                if _is_ours(entry.tid, fd):
                    thread.call(entry.place, "close", fd)
        thread.call(entry.place, "munmap", entry.pages, entry.length)
    finally:
        thread.restore()


def _is_ours(tid: int, fd: int) -> bool:
    """Whether a descriptor is of a kind that a dump opens. The number was only expected: whoever shares the table with
    this thread runs on since the dumper's death, and may have got it for a file of its own."""
    name = os.readlink(f"/proc/{tid}/fd/{fd}")
    return name.startswith(OF_DUMPS) or (os.path.basename(name).startswith("pages-") and name.endswith(".img"))


def _change_back(entry: Entry) -> None:
    memory = TaskMemory(entry.tid)
    try:
        memory.write(entry.changed, entry.original)
    finally:
        memory.close()


def _stop(tid: int) -> None:
    """Seize and stop. The dead tracer may be on its way out still: the kernel then says EPERM for a moment."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        try:
            ptrace.seize(tid, seize_options(tid))
            break
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
    ptrace.interrupt(tid)
    stop = ptrace.wait_for_stop(tid)
    while stop.exited is None and not stop.event:
        ptrace.interrupt(tid)
        ptrace.cont(tid, stop.signal)
        stop = ptrace.wait_for_stop(tid)
    if stop.exited is not None:
        raise ProcessLookupError

