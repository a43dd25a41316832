# SPDX-License-Identifier: Apache-2.0
"""A small event loop on epoll.

The servers are single-threaded on purpose: what one callback does is finished before anything else runs, so
"between two callbacks" is a point at which no I/O is in flight. asyncio would add a task switch and several
Python calls to each batch of requests; this loop adds one `epoll_wait` and one call.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType

__all__ = ["EPOLLIN", "EPOLLOUT", "EventLoop", "Timer"]

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT
_PURGE_MINIMUM = 256


class Timer:
    """One call in the future, or a repeated one; `cancel()` may be called at any time and twice."""

    def __init__(self, function: Callable[[], None], period: float | None = None) -> None:
        self.function = function
        self.period = period
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.function = _nothing  # and let go of what the call would have needed


def _nothing() -> None:
    pass


class EventLoop:
    """Calls functions when descriptors are ready, when time has passed, or at the next turn.

    An exception of a callback leaves `run()`; the loop can be run again after it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._purge_at = _PURGE_MINIMUM
        self._sequence = itertools.count()
        self._stopped = False
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._close_wakeup = weakref.finalize(self, os.close, self._wakeup)
        self.register(self._wakeup, EPOLLIN, self._awake)

    def register(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready_events)` whenever one of `events` (EPOLLIN, EPOLLOUT) holds. Level-triggered.

        Raises FileExistsError when `fd` is registered, PermissionError when it is a regular file.
        """
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on a registered descriptor; 0 leaves only errors and hang-up."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget a descriptor. It must still be open: close it afterwards, never before."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call once in the next turn, after the descriptors that are ready then."""
        self._soon.append(function)

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call once after so many seconds (monotonic clock)."""
        return self._schedule(seconds, Timer(function))

    def every(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call again and again, first after one period; turns that were missed are not made up for."""
        return self._schedule(seconds, Timer(function, seconds))

    def run(self) -> None:
        """Turn until `stop()`."""
        while not self._stopped:
            self.run_once()
        self._stopped = False

    def stop(self) -> None:
        """Let `run()` return after the current turn. May be called from a signal handler or another thread: a
        handler alone would not end the wait, which Python resumes after it."""
        self._stopped = True
        os.eventfd_write(self._wakeup, 1)

    def _awake(self, events: int) -> None:
        os.eventfd_read(self._wakeup)

    def run_once(self, timeout: float | None = None) -> None:
        """One turn: wait at most `timeout` seconds (None: until something happens), then call what is
        ready."""
        callbacks = self._callbacks
        for fd, events in self._epoll.poll(self._patience(timeout)):
            callback = callbacks.get(fd)  # an earlier callback of this turn may have taken it off
            if callback is not None:
                callback(events)
        for _ in range(len(self._soon)):
            self._soon.popleft()()
        if self._timers:
            self._run_timers()

    def close(self) -> None:
        """Give the epoll descriptor back. Registered descriptors stay open: they belong to who registered
        them."""
        self._epoll.close()
        self._close_wakeup()
        self._callbacks.clear()
        self._soon.clear()
        self._timers.clear()

    def __enter__(self) -> EventLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _schedule(self, seconds: float, timer: Timer) -> Timer:
        if len(self._timers) >= self._purge_at:
            self._purge()
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), timer))
        return timer

    def _purge(self) -> None:
        """Forget cancelled timers: clients that come and go by the thousand each leave one behind."""
        self._timers = [entry for entry in self._timers if not entry[2].cancelled]
        heapq.heapify(self._timers)
        self._purge_at = max(_PURGE_MINIMUM, 2 * len(self._timers))

    def _patience(self, timeout: float | None) -> float | None:
        if self._soon:
            return 0
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if not self._timers:
            return timeout
        wait = max(0.0, self._timers[0][0] - time.monotonic())
        return wait if timeout is None else min(wait, timeout)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.cancelled:
                continue
            if timer.period is not None:
                self._schedule(timer.period, timer)
            timer.function()
