# SPDX-License-Identifier: Apache-2.0
"""The processes of a restore while they are made: they report to the restorer, and wait for each other.

Each one reports once per stage and then waits until all have. How many there are is known when every one has told how
many it made. Nobody outlives the restorer: parents take their children with them, and what the kernel hands to a new
parent meanwhile comes to the restorer, which is a subreaper for that time.
"""

from __future__ import annotations

import contextlib
import ctypes
import marshal
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from stasis.errors import StasisError
from stasis.linux import process, procfs
from stasis.process.dump.ids import own_kinds_of
from stasis.process.namespaces.apart import Apart

if TYPE_CHECKING:
    from stasis.process.files.opening import FileSet
    from stasis.process.images import ImageSet
    from stasis.process.namespaces.mounting import Copies
    from stasis.process.restore.inheritance import Inheritance
    from stasis.process.restore.plan import TaskPlan

__all__ = ["Crew", "Gate", "Reports", "Roll", "adopting", "collect", "live_with", "outlive_nobody"]

FRAME = struct.Struct("<iH?")
"""Before each portion of a report: whose it is, how many bytes, whether it is the last one."""
PORTION = select.PIPE_BUF - FRAME.size
PATIENCE = 120.0
"""Seconds without any report after which a restore is given up."""
LOOK_AFTER = 0.2
"""Seconds without any report after which it is looked whether those who are to report are alive."""
PAUSE = 0.001
MOST_PIDS = 1 << 16


class Reports:
    """A pipe through which processes report, in portions that the kernel does not tear apart (PIPE_BUF, pipe(7)).

    Processes and restorer are the same program, so what they tell each other is in Python's own form; a socket and JSON
    would be 4 ms more of imports.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._parts: dict[int, bytes] = {}
        self._told: list[bytes] = []

    def send(self, report: dict[str, Any]) -> None:
        """In a process."""
        message, pid = marshal.dumps(report), os.getpid()
        for start in range(0, len(message), PORTION):
            portion = message[start : start + PORTION]
            os.write(self.writer, FRAME.pack(pid, len(portion), start + PORTION >= len(message)) + portion)

    def receive(self, awaited: Iterable[int]) -> dict[str, Any]:
        """In the restorer: the next report, of one of the `awaited`. StasisError where none comes any more."""
        while not self._told:
            self._wait(awaited)
            head = os.read(self.reader, FRAME.size)
            if not head:
                raise StasisError("a process ended before it was restored")
            pid, length, is_last = FRAME.unpack(head)
            self._parts[pid] = self._parts.get(pid, b"") + os.read(self.reader, length)
            if is_last:
                self._told.append(self._parts.pop(pid))
        report: dict[str, Any] = marshal.loads(self._told.pop(0))
        return report

    def _wait(self, awaited: Iterable[int]) -> None:
        """Until there is something to read. Who ended has told before all that it had to tell."""
        poll, deadline = select.poll(), time.monotonic() + PATIENCE
        poll.register(self.reader, select.POLLIN)
        while not poll.poll(LOOK_AFTER * 1000):
            dead = next(filter(_has_ended, awaited), None)
            if dead is not None and not poll.poll(0):
                raise StasisError(f"process {dead} ended before it was restored")
            if time.monotonic() > deadline:
                raise StasisError("a process of the restore does not get ready")

    def close_reader(self) -> None:
        """May be called again, as the next one."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


def collect(reports: Reports, first: int, stage: str) -> list[dict[str, Any]]:
    """Reports of a stage from the first process and all below it. StasisError where one tells of an error, or ended."""
    found: dict[int, dict[str, Any]] = {}
    expected = {first}
    while expected - found.keys():
        report = reports.receive(expected - found.keys())
        if "error" in report:
            raise StasisError.from_dict(report)
        assert report["stage"] == stage
        expected.update(report["made"])
        found[report["pid"]] = report
    return list(found.values())


def _has_ended(pid: int) -> bool:
    try:
        return procfs.stat(pid).state in "ZX"
    except ProcessLookupError:
        return True


class Gate:
    """Where processes wait for each other. Each has a gate of its own per stage: a byte in the pipe for everyone."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    def open(self, count: int) -> None:
        """In the restorer: let all go on."""
        for _ in range(count):
            os.write(self._writer, b"g")
        self.close()

    def leave(self) -> None:
        """In a process: this end is the restorer's."""
        os.close(self._writer)

    def close(self) -> None:
        """In the restorer: who waits still ends. May be called again."""
        if self._writer >= 0:
            os.close(self.reader)
            os.close(self._writer)
            self._writer = -1

    def wait(self) -> None:
        """Go on when the gate is opened. Does not return where the restorer is gone. The descriptor stays: another
        process may have it from the same table, and wait still."""
        if not os.read(self.reader, 1):
            os._exit(1)


def live_with(parent: int, until_then: int) -> None:
    """End when `parent` does. Whoever has another parent, `until_then`, waits until it is handed on to this one."""
    while os.getppid() == until_then != parent:
        time.sleep(PAUSE)
    process.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before it was our parent


class Crew:
    """What all processes know of each other. `is_guest`: the tree is in the session of the one who restores it.
    `is_sibling`: the first process is a child of the restorer's parent. `links`: what the other ends of network devices
    are called; `own`: kinds of namespaces that the tree has of its own."""

    def __init__(
        self, root: TaskPlan, files: FileSet, chain: list[ImageSet], reports: Reports, gates: dict[str, Gate],
        links: Mapping[str, str],
    ) -> None:
        self.root = root
        self.files = files
        self.chain = chain
        self.reports = reports
        self.gates = gates
        self.links = links
        self.copies: dict[int, Copies] = {}
        self.own = [] if root.ids is None else own_kinds_of(files.images, root.ids)
        others = [plan.ids for plan in root.walk() if plan.ids is not None]
        assert root.ids is not None
        self.apart = Apart(root.ids, others, files.images.inventory.root_ids or root.ids)
        files.live_in(self.apart)
        self.pids = frozenset(plan.pid for plan in root.walk())
        self.is_guest = False
        self.is_sibling = False
        self.shared_fd: dict[int, int] = {}
        self.inheritance: Inheritance | None = None

    def report(self, **fields: Any) -> None:
        self.reports.send(fields)

    def stage(self, name: str, made: list[int]) -> None:
        """Tell that this process has come so far and which it has made, and wait for all others."""
        self.report(stage=name, pid=os.getpid(), made=made)
        self.gates[name].wait()


def outlive_nobody(crew: Crew) -> NoReturn:
    """Wait to be made another process. Who is no child of the restorer ends when nobody is left to read its reports."""
    if crew.is_sibling:
        poll = select.poll()
        poll.register(crew.reports.writer, 0)
        poll.poll()
        os._exit(1)
    while True:
        signal.pause()


class Roll:
    """The processes that a guardian ends if the restorer dies: memory that it shares with it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4 * MOST_PIDS)
        self._pids = (ctypes.c_int32 * MOST_PIDS).from_buffer(self._memory)

    def enter(self, pids: Iterable[int]) -> None:
        """They are ours from here on."""
        for number, pid in reversed(list(enumerate(list(pids)[:MOST_PIDS]))):
            self._pids[number] = pid  # the first one last: from here on the guardian believes them

    @property
    def is_called(self) -> bool:
        """Whether the guardian would end them."""
        return bool(self._pids[0])

    def clear(self) -> None:
        """They are on their own."""
        self._pids[0] = 0

    @contextmanager
    def called(self, pids: Iterable[int]) -> Iterator[None]:
        """For those who are to end with this: they do so whatever goes wrong."""
        self.enter(pids)
        try:
            yield
        except BaseException:
            self.end()
            raise
        finally:
            self.clear()

    def end(self) -> None:
        """Kill them all, the last one first."""
        if self._pids[0]:
            for pid in reversed([pid for pid in self._pids if pid]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def adopting() -> Iterator[Callable[[], None]]:
    """Be the one whom orphans come to, and give a function that ends all children that came since."""
    before = _children()
    was = process.is_subreaper()
    process.set_subreaper(True)
    try:
        yield lambda: _end_all(before)
    finally:
        process.set_subreaper(was)


def _children() -> set[int]:
    pid = os.getpid()
    return {child for tid in procfs.threads(pid) for child in procfs.children(pid, tid)}


def _end_all(but: set[int]) -> None:
    """Again and again: who loses its parent becomes our child."""
    while ours := _children() - but:
        for pid in ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in ours:
            with contextlib.suppress(ChildProcessError):
                while os.WIFSTOPPED(os.waitpid(pid, _WALL)[1]):
                    pass


_WALL = 0x40000000  # include/uapi/linux/wait.h: threads that we trace, too
