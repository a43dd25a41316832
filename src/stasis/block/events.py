# SPDX-License-Identifier: Apache-2.0
"""What happens to a snapshot after it was taken, in order, for everybody who watches.

One queue per snapshot. Every event carries a sequence number and stays in the queue, so several watchers each see all
of them and a watcher that comes late misses nothing. Beside that, `take` hands each event to one reader only, as a
kernel module does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

__all__ = ["Event", "EventCode", "EventQueue"]


class EventCode(IntEnum):
    """Numbers of the events; 0 and 1 are those of blksnap's `snapshot_waitevent`."""

    CORRUPTED = 0
    NO_SPACE = 1
    LOW_SPACE = 2
    GENERATION = 3


@dataclass(frozen=True)
class Event:
    """One event of one snapshot.

    `time` is the monotonic clock in nanoseconds, `error_code` a negative errno or 0, `requested` the bytes of
    difference storage asked for when the event concerns space, `device` the name of the device or "" for the
    whole snapshot.
    """

    sequence: int
    code: int
    event: str
    snapshot: str
    device: str
    error_code: int
    requested: int
    time: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class EventQueue:
    """The events of one snapshot. Thread-safe; readers wait on it and are woken at once when it closes."""

    LIMIT = 4096
    """Events kept. A snapshot has a handful; the bound is for a device whose size keeps changing."""

    def __init__(self, events: Iterable[Event] = (), delivered: Iterable[int] = ()) -> None:
        self._events: list[Event] = list(events)
        self._delivered = set(delivered)
        self._changed = threading.Condition()
        self._closed = False

    def post(self, name: str, snapshot: str, *, device: str = "", error_code: int = 0, requested: int = 0,
             monotonic_ns: int | None = None, reason: str = "") -> Event:
        """Append an event named like a member of EventCode, in lower case; KeyError for any other name."""
        code = EventCode[name.upper()]
        with self._changed:
            event = Event(self.last + 1, int(code), name, snapshot, device, error_code, requested,
                          time.monotonic_ns() if monotonic_ns is None else monotonic_ns, reason)
            self._events.append(event)
            del self._events[:-self.LIMIT]
            self._changed.notify_all()
        return event

    @property
    def last(self) -> int:
        """Sequence number of the newest event, 0 if there was none."""
        return self._events[-1].sequence if self._events else 0

    @property
    def closed(self) -> bool:
        return self._closed

    def events(self, after: int = 0) -> list[Event]:
        """All kept events with a sequence number above `after`, oldest first."""
        with self._changed:
            return [event for event in self._events if event.sequence > after]

    def wait(self, after: int, timeout: float | None) -> list[Event]:
        """As `events`, but waits up to `timeout` seconds (None: for ever) for the first, or until `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.last > after, timeout)
            return [event for event in self._events if event.sequence > after]

    def take(self, codes: Collection[int]) -> Event | None:
        """The oldest event with one of these codes that nobody took yet, which nobody else is given; None without."""
        with self._changed:
            event = None if self._closed else self._undelivered(codes)
            if event is not None:
                self._delivered.add(event.sequence)
            return event

    def wait_to_take(self, codes: Collection[int], timeout: float | None) -> None:
        """Wait up to `timeout` seconds (None: for ever) until `take` has something, or the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._undelivered(codes) is not None, timeout)

    def _undelivered(self, codes: Collection[int]) -> Event | None:
        return next((event for event in self._events
                     if event.code in codes and event.sequence not in self._delivered), None)  # fmt: skip

    def delivered(self) -> list[int]:
        """Sequence numbers of the kept events that were taken."""
        with self._changed:
            return [event.sequence for event in self._events if event.sequence in self._delivered]

    def close(self) -> None:
        """Tell every reader that no more events will come; called when the snapshot is destroyed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
