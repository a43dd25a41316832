# SPDX-License-Identifier: Apache-2.0
"""Threads that take pieces of work in ascending order, and know below which offset everything is done.

`Transfer` reads windows of a plan from an image and hands each to a function. Two connections and two threads
are enough: while one thread writes a window to the target the other one's requests keep the server busy, and
recvmsg, pwrite and memcmp all run without the interpreter lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Generic, Protocol, TypeVar

from stasis.block.copy.plan import Window
from stasis.block.copy.source import OpenSource
from stasis.linux.iobuffer import IoBuffer

__all__ = ["Crew", "Handler", "Task", "Transfer", "Worker"]

Handler = Callable[[Window, IoBuffer], None]
TICK_SECONDS = 0.1


class Task(Protocol):
    """A piece of work. Each settles `length` bytes below the offset `end`, and all that the one before left above."""

    @property
    def end(self) -> int: ...

    @property
    def length(self) -> int: ...


TaskT = TypeVar("TaskT", bound=Task)
WorkT = TypeVar("WorkT", contravariant=True)


class Worker(Protocol[WorkT]):
    """What one thread works with: opened, used and closed in it."""

    def handle(self, task: WorkT, /) -> None:
        """Do one piece of work. Raises what goes wrong."""

    def abort(self) -> None:
        """Called from another thread: end what is under way, with an error if need be."""

    def close(self) -> None:
        """Give back what the worker holds."""


class Crew(Generic[TaskT]):
    """One pass over tasks. `run` is called once, from the thread that gets the signals."""

    def __init__(self, open_worker: Callable[[], Worker[TaskT]], threads: int) -> None:
        self._open_worker = open_worker
        self._threads = threads
        self._condition = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._running = 0
        self._done_bytes = 0
        self._workers: list[Worker[TaskT]] = []
        # Ends of the tasks that are under way, and the end of the last task that was handed out.
        self._started: dict[int, int] = {}
        self._next_serial = 0
        self._handed_out = 0

    @property
    def position(self) -> int:
        """Everything of the plan below this offset has been handled."""
        with self._condition:
            return min(self._started.values(), default=self._handed_out)

    def run(self, plan: Iterable[TaskT], start: int, tick: Callable[[int], None]) -> None:
        """Handle all tasks; calls ``tick`` with the bytes handled, about ten times per second and at the
        end.

        Raises what a thread or ``tick`` raised first. In each case no thread runs any more when it returns.
        """
        self._handed_out = start
        supply = self._supply(plan, start)
        threads = [
            threading.Thread(target=self._work, args=(supply,), name=f"copy-{number}", daemon=True)
            for number in range(self._threads)
        ]
        self._running = len(threads)
        try:
            for thread in threads:
                thread.start()
            self._watch(tick)
        finally:
            self._stop(threads)
        if self._error is not None:
            raise self._error
        tick(self._done_bytes)

    def _watch(self, tick: Callable[[int], None]) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: not self._running, TICK_SECONDS)
                if not self._running:
                    return
                done = self._done_bytes
            tick(done)

    def _stop(self, threads: list[threading.Thread]) -> None:
        with self._condition:
            self._stopping = True
            interrupted = self._running > 0
            workers = list(self._workers)
        if interrupted:
            for worker in workers:
                worker.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()

    def _supply(self, plan: Iterable[TaskT], start: int) -> Iterator[tuple[int, TaskT]]:
        """Number the tasks and keep account of which are under way. Only called with the condition held."""
        lowest = start
        for task in plan:
            serial, self._next_serial = self._next_serial, self._next_serial + 1
            self._started[serial] = lowest
            self._handed_out = lowest = task.end
            yield serial, task

    def _work(self, supply: Iterator[tuple[int, TaskT]]) -> None:
        try:
            with closing(self._open_worker()) as worker:
                with self._condition:
                    self._workers.append(worker)
                self._handle_all(supply, worker)
        except BaseException as error:  # handed to the caller of run(), which raises it
            with self._condition:
                if self._error is None and not self._stopping:
                    self._error = error
                self._stopping = True
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def _handle_all(self, supply: Iterator[tuple[int, TaskT]], worker: Worker[TaskT]) -> None:
        while (taken := self._take(supply)) is not None:
            serial, task = taken
            worker.handle(task)
            with self._condition:
                del self._started[serial]
                self._done_bytes += task.length

    def _take(self, supply: Iterator[tuple[int, TaskT]]) -> tuple[int, TaskT] | None:
        with self._condition:
            return None if self._stopping else next(supply, None)


class Transfer(Crew[Window]):
    """One pass over windows: each is read from the image and handed to `handler`."""

    def __init__(self, open_source: OpenSource, handler: Handler, window_size: int, connections: int) -> None:
        super().__init__(lambda: _Reading(open_source, handler, window_size), connections)


class _Reading:
    """A connection to the image, with the buffer that its windows are read into."""

    def __init__(self, open_source: OpenSource, handler: Handler, window_size: int) -> None:
        self._source = open_source()
        self._handler = handler
        self._buffer = IoBuffer(window_size)

    def handle(self, window: Window) -> None:
        if window.reads:
            self._source.read(window.reads, self._buffer)
        self._handler(window, self._buffer)

    def abort(self) -> None:
        self._source.abort()

    def close(self) -> None:
        try:
            self._source.close()
        finally:
            self._buffer.close()
