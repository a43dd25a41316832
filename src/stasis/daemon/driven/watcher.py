# SPDX-License-Identifier: Apache-2.0
"""A thread per snapshot that waits for what its module has to tell."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from stasis.blksnap.drivers import Driver, DriverEvent, Held
from stasis.errors import NotFoundError, StasisError

__all__ = ["Watcher"]

TIMEOUT_MS = 100
"""Short: the module keeps a destroyed snapshot as long as somebody waits, and may wait ten times longer than asked."""
PAUSE = 1.0
"""Seconds until the next try when the module answered an error."""

log = logging.getLogger(__name__)


class Watcher:
    """Gives every event to `told`, in its own thread; `gone` is called once if somebody else ends the snapshot."""

    def __init__(self, driver: Driver, held: Held, told: Callable[[DriverEvent], None],
                 gone: Callable[[], None]) -> None:
        self._driver, self._held, self._told, self._gone = driver, held, told, gone
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{held.uuid[:8]}", daemon=True)
        if driver.has_events:
            self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                event = self._driver.next_event(self._held, TIMEOUT_MS)
            except NotFoundError:
                if not self._stopped.is_set():
                    self._gone()
                return
            except StasisError as error:
                log.error("no events of the snapshot %s: %s", self._held.uuid, error)
                self._stopped.wait(PAUSE)
                continue
            if event is not None:
                self._told(event)

    def stop(self) -> None:
        """Wait for nothing any more; returns when nobody waits."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
