# SPDX-License-Identifier: Apache-2.0
"""Slow system calls beside an event loop: a thread does them, the loop gets the result between batches."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

from stasis.linux.eventloop import EventLoop

Done = Callable[[OSError | None], None]


class Background:
    """Runs one function at a time in a thread and hands (None or its OSError) to `done` in the loop's thread."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._jobs: deque[tuple[Callable[[], None], Done]] = deque()
        self._results: deque[tuple[Done, OSError | None]] = deque()
        self._wakeup = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)
        self._thread.start()
        loop.register(self._event, select.EPOLLIN, self._deliver)

    def run(self, job: Callable[[], None], done: Done) -> None:
        """Queue `job`; it must touch nothing that the loop's thread changes."""
        with self._wakeup:
            self._jobs.append((job, done))
            self._wakeup.notify()

    def close(self) -> None:
        """Finish what is queued, deliver it, end the thread."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        self._thread.join()
        self._deliver(0)
        self._loop.unregister(self._event)
        os.close(self._event)

    def _work(self) -> None:
        while True:
            with self._wakeup:
                self._wakeup.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job, done = self._jobs.popleft()
            error: OSError | None = None
            try:
                job()
            except OSError as caught:
                error = caught
            self._results.append((done, error))
            os.eventfd_write(self._event, 1)

    def _deliver(self, _events: int) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass  # nothing new, or taken already
        while self._results:
            done, error = self._results.popleft()
            done(error)
