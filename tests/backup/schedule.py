# SPDX-License-Identifier: Apache-2.0
"""Runs threads one request at a time in an order that is drawn, with a clock that only the test moves.

A thread gives up its turn before each request to the store and whenever it sleeps. So a test can try thousands of
orders of the requests of two hosts, and repeat each one by its seed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

__all__ = ["Schedule"]

REQUEST_SECONDS = 0.05


class Schedule:
    """Has the interface of the module `time` as far as it is used, for modules whose time it is to be."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, seed: int) -> None:
        self.now = 1_000_000.0
        self.source = random.Random(seed)
        self._turn = threading.Condition()
        self._current: str | None = None
        self._sleepers: dict[str, float] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._errors: dict[str, BaseException] = {}

    def run(self, **tasks: Callable[[], None]) -> dict[str, BaseException]:
        """Run each task in a thread of its own to its end; returns how those ended that did not end well."""
        for name, task in tasks.items():
            self._sleepers[name] = self.now
            self._threads[name] = threading.Thread(target=self._body, args=(name, task), name=name)
        for thread in self._threads.values():
            thread.start()
        self._pass_on()
        for thread in self._threads.values():
            thread.join()
        return self._errors

    def point(self, *_: object) -> None:
        """A request begins: somebody else may come first."""
        self.now += REQUEST_SECONDS
        self._wait(self.now)

    def sleep(self, seconds: float) -> None:
        self._wait(self.now + seconds)

    def clock_gettime(self, clock: int) -> float:
        assert clock == self.CLOCK_BOOTTIME
        return self.now

    def monotonic(self) -> float:
        return self.now

    def freeze(self, name: str, seconds: float) -> None:
        """Let a thread sleep where it is, as a suspended machine does."""
        if name in self._sleepers:
            self._sleepers[name] = max(self._sleepers[name], self.now + seconds)

    def _body(self, name: str, task: Callable[[], None]) -> None:
        try:
            self._await_turn(name)
            task()
        except BaseException as error:
            self._errors[name] = error
        finally:
            del self._sleepers[name]
            self._pass_on()

    def _wait(self, until: float) -> None:
        name = threading.current_thread().name
        if name not in self._threads:  # the test itself, before or after
            self.now = max(self.now, until)
            return
        self._sleepers[name] = until
        self._pass_on()
        self._await_turn(name)

    def _pass_on(self) -> None:
        """Choose who is next among those that are awake; if nobody is, time passes until somebody is."""
        with self._turn:
            awake = [name for name, until in self._sleepers.items() if until <= self.now]
            if not awake and self._sleepers:
                self.now = min(self._sleepers.values())
                awake = [name for name, until in self._sleepers.items() if until <= self.now]
            self._current = self.source.choice(sorted(awake)) if awake else None
            self._turn.notify_all()

    def _await_turn(self, name: str) -> None:
        with self._turn:
            assert self._turn.wait_for(lambda: self._current == name, timeout=60)
