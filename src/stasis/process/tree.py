# SPDX-License-Identifier: Apache-2.0
"""A process tree that stands still: every task and thread of it seized and stopped, or none.

New tasks can only come from tasks that run, so passes over the tree are made until one finds nothing new: then all
that exists is stopped and nothing can be added. Whatever fails, also a task that does not stop in time, everything is
let go as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stasis.errors import StasisError, UnsupportedError
from stasis.linux import procfs, ptrace
from stasis.process.errors import refusal
from stasis.process.seccomp import seize_options
from stasis.process.vforks import is_in_vfork

if TYPE_CHECKING:
    from stasis.linux.procfs import Stat
    from stasis.process.freezer import GroupFreezer

__all__ = ["MOMENTS", "Task", "TaskState", "Thread", "Tree"]

PAUSE = 0.0001
LONGEST_PAUSE = 0.002
MOMENTS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Seconds to wait for what passes."""


class VforkError(UnsupportedError):
    """A thread cannot be stopped now."""


class TaskState(IntEnum):
    """What a task was doing, with the numbers of CRIU's images."""

    ALIVE = 1
    ZOMBIE = 2
    STOPPED = 3


class Thread:
    """A thread that is stopped. `stop_signal`: what stopped it before we came, 0 if it ran."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.stop_signal = 0
        self.is_stopped = False


class Task:
    """A process of the tree: `stat` as it was when it was found."""

    def __init__(self, pid: int, stat: Stat) -> None:
        self.pid = pid
        self.stat = stat
        self.threads: list[Thread] = []
        self.children: list[Task] = []

    @property
    def is_zombie(self) -> bool:
        """Dead, and not waited for by its parent yet."""
        return self.stat.state in "ZX"

    @property
    def state(self) -> TaskState:
        """Running, stopped or dead."""
        if self.is_zombie:
            return TaskState.ZOMBIE
        return TaskState.STOPPED if self.threads and self.threads[0].stop_signal else TaskState.ALIVE


class Tree:
    """A process and all its descendants, stopped from `freeze` to `thaw`; a context manager that thaws.

    All calls must come from one thread: the kernel takes a tracer to be a thread.
    """

    def __init__(
        self, root: int, *, timeout: float = 10.0, group: GroupFreezer | None = None
    ) -> None:
        """`timeout`: seconds after which a tree that could not be stopped is let go. `group`: a control group that all
        are in, which stands still while they are seized."""
        self.root_pid = root
        self._group = group
        self._waiting: list[tuple[Task, Thread]] = []
        self._timeout = timeout
        self._tasks: dict[int, Task] = {}
        self._deadline = 0.0

    @property
    def root(self) -> Task:
        """The process that the tree was asked for."""
        return self._tasks[self.root_pid]

    @property
    def tasks(self) -> list[Task]:
        """All tasks, parents before their children."""
        return list(_walk(self.root))

    def freeze(self) -> None:
        """Stop everything. Raises StasisError that names what could not be stopped; nothing is stopped then. One that
        waits for a child in vfork(2) is given a moment."""
        for pause in MOMENTS:
            try:
                self._freeze()
            except VforkError:
                time.sleep(pause)
            else:
                return
        self._freeze()

    def _freeze(self) -> None:
        self._deadline = time.monotonic() + self._timeout
        self._tasks.clear()
        self._waiting.clear()
        try:
            self._add(self.root_pid, None)
            if self._group is not None:
                self._seize_all(self._group)
            if self.root.is_zombie and len(procfs.threads(self.root_pid)) > 1:
                raise UnsupportedError(f"process {self.root_pid}: threads: the first one has ended while others run, "
                                       "which no image can say")  # fmt: skip
            if self.root.is_zombie:
                raise StasisError(f"process {self.root_pid} is a zombie", hint="its parent has to wait for it")
            while self._pass():
                pass
        except BaseException:
            self.thaw()
            raise

    def _seize_all(self, group: GroupFreezer) -> None:
        """Seize all that there are while they stand still, and wait for their stops when they do no more."""
        with group:
            while self._pass(waits=False):
                pass
        for task, thread in self._waiting:
            self._wait(task, thread)

    def _pass(self, *, waits: bool = True) -> bool:
        """Look at all tasks once; tells whether anything new was found."""
        found = False
        for task in list(self._tasks.values()):
            if task.is_zombie:
                continue
            found |= self._stop_threads(task, waits=waits)
            for thread in list(task.threads):
                for pid in procfs.children(task.pid, thread.tid):
                    if pid not in self._tasks:
                        found |= self._add(pid, task)
        return found

    def _add(self, pid: int, parent: Task | None) -> bool:
        try:
            task = Task(pid, procfs.stat(pid))
        except OSError as error:
            if parent is None:
                raise refusal(pid, error) from error
            return False  # it came and went while its parent still ran
        self._tasks[pid] = task
        if parent is not None:
            parent.children.append(task)
        return True

    def _stop_threads(self, task: Task, *, waits: bool) -> bool:
        """Seize and stop the threads that are new; tells whether there were any."""
        known = {thread.tid for thread in task.threads}
        try:
            new = [tid for tid in procfs.threads(task.pid) if tid not in known]
        except ProcessLookupError:
            new = []
        seized = [thread for tid in new if (thread := self._seize(task, tid)) is not None]
        for thread in seized:
            if waits:
                self._wait(task, thread)
            else:
                self._waiting.append((task, thread))
        return bool(new)

    def _seize(self, task: Task, tid: int) -> Thread | None:
        if is_in_vfork(task.pid, tid):
            raise VforkError(f"process {task.pid}: thread {tid}: it waits for a child that uses its memory (vfork)",
                             hint="nothing was changed; try again when the child has started its program")  # fmt: skip
        try:
            ptrace.seize(tid, seize_options(tid))
        except OSError as error:
            if isinstance(error, ProcessLookupError) or self._ended(task, tid):
                return None
            raise refusal(task.pid, error) from error
        thread = Thread(tid)
        task.threads.append(thread)
        ptrace.interrupt(tid)
        return thread

    def _ended(self, task: Task, tid: int) -> bool:
        """A thread that ended meanwhile; a process that did becomes a zombie of the tree."""
        try:
            found = procfs.stat(task.pid, tid)
        except ProcessLookupError:
            return True
        if found.state in "ZX" and tid == task.pid:
            task.stat = found
        return found.state in "ZX"

    def _wait(self, task: Task, thread: Thread) -> None:
        pause = PAUSE
        while (stop := ptrace.poll_stop(thread.tid)) is None:
            if time.monotonic() > self._deadline:
                raise StasisError(
                    f"thread {thread.tid} of process {task.pid} did not stop within {self._timeout:g} seconds",
                    hint="it may wait for a device or network file system; nothing was changed",
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if stop.exited is not None:
            task.threads.remove(thread)
            if thread.tid == task.pid:
                self._ended(task, thread.tid)
            return
        thread.is_stopped = True
        if stop.is_group_stop:
            thread.stop_signal = stop.signal
        elif not stop.event:
            # A signal was about to be delivered: it goes back to where it was, to be delivered later.
            self._put_back(task, thread, stop.signal)

    def _put_back(self, task: Task, thread: Thread, number: int) -> None:
        """Let a signal take its way into the task and stop right behind it."""
        ptrace.interrupt(thread.tid)
        ptrace.cont(thread.tid, number)
        thread.is_stopped = False
        self._wait(task, thread)

    def thaw(self) -> None:
        """Let every task go on as it was: those that were stopped stay so. Also after a failure half way."""
        if self._group is not None:
            self._group.put_back()
        for task in self._tasks.values():
            for thread in task.threads:
                _let_go(thread)
            task.threads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()


def _walk(task: Task) -> Iterator[Task]:
    yield task
    for child in task.children:
        yield from _walk(child)


def _let_go(thread: Thread) -> None:
    """Detach; a thread that does not stop for it is let go when this process ends."""
    try:
        if not thread.is_stopped:
            stop = ptrace.poll_stop(thread.tid)
            if stop is None or stop.exited is not None:
                return
        ptrace.detach(thread.tid)
    except OSError:
        return  # it was killed meanwhile
