# SPDX-License-Identifier: Apache-2.0
"""Threads that take windows of a plan, read each from the image and hand it to a function.

Two connections and two threads are enough: while one thread writes a window to the target the other one's
requests keep the server busy, and recvmsg, pwrite and memcmp all run without the interpreter lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

from stasis.block.copy.plan import Window
from stasis.block.copy.source import ImageSource, OpenSource
from stasis.linux.iobuffer import IoBuffer

__all__ = ["Handler", "Transfer"]

Handler = Callable[[Window, IoBuffer], None]
TICK_SECONDS = 0.1


class Transfer:
    """One pass over windows. `run` is called once, from the thread that gets the signals."""

    def __init__(self, open_source: OpenSource, handler: Handler, window_size: int, connections: int) -> None:
        self._open_source = open_source
        self._handler = handler
        self._window_size = window_size
        self._connections = connections
        self._condition = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._running = 0
        self._done_bytes = 0
        self._sources: list[ImageSource] = []
        # Ends of the windows that are under way, and the end of the last window that was handed out.
        self._started: dict[int, int] = {}
        self._next_serial = 0
        self._handed_out = 0

    @property
    def position(self) -> int:
        """Everything of the plan below this offset has been handled."""
        with self._condition:
            return min(self._started.values(), default=self._handed_out)

    def run(self, plan: Iterable[Window], start: int, tick: Callable[[int], None]) -> None:
        """Handle all windows; calls ``tick`` with the bytes handled, about ten times per second and at the
        end.

        Raises what a thread or ``tick`` raised first. In each case no thread runs any more when it returns.
        """
        self._handed_out = start
        supply = self._supply(plan, start)
        threads = [
            threading.Thread(target=self._work, args=(supply,), name=f"copy-{number}", daemon=True)
            for number in range(self._connections)
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
            sources = list(self._sources)
        if interrupted:
            for source in sources:
                source.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()

    def _supply(self, plan: Iterable[Window], start: int) -> Iterator[tuple[int, Window]]:
        """Number the windows and keep account of which are under way. Only called with the condition held."""
        lowest = start
        for window in plan:
            serial, self._next_serial = self._next_serial, self._next_serial + 1
            self._started[serial] = lowest
            self._handed_out = lowest = window.end
            yield serial, window

    def _work(self, supply: Iterator[tuple[int, Window]]) -> None:
        try:
            with closing(self._open_source()) as source, IoBuffer(self._window_size) as buffer:
                with self._condition:
                    self._sources.append(source)
                self._handle_all(supply, source, buffer)
        except BaseException as error:  # handed to the caller of run(), which raises it
            with self._condition:
                if self._error is None and not self._stopping:
                    self._error = error
                self._stopping = True
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def _handle_all(self, supply: Iterator[tuple[int, Window]], source: ImageSource, buffer: IoBuffer) -> None:
        while (taken := self._take(supply)) is not None:
            serial, window = taken
            if window.reads:
                source.read(window.reads, buffer)
            self._handler(window, buffer)
            with self._condition:
                del self._started[serial]
                self._done_bytes += window.length

    def _take(self, supply: Iterator[tuple[int, Window]]) -> tuple[int, Window] | None:
        with self._condition:
            return None if self._stopping else next(supply, None)
