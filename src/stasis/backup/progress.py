# SPDX-License-Identifier: Apache-2.0
"""How far a long job is: counters that its threads move, and that whoever shows them reads at any time.

A job counts into a `Progress` and knows nothing of bars, JSON or signals; `stasis.cli.backup.reporting` shows it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from stasis.errors import StasisError
from stasis.units import format_size

__all__ = ["Progress", "Status"]

RATE_SECONDS = 15.0  # the rate is that of about this long, so that the time left follows a store that slows down


@dataclass(frozen=True, slots=True)
class Status:
    """A job at one instant. What is not known yet is None; sizes are bytes, times seconds."""

    phase: str
    bytes_done: int
    bytes_total: int | None
    items_done: int
    items_total: int | None
    seconds_elapsed: float
    bytes_per_second: int
    seconds_remaining: int | None

    @property
    def percent(self) -> float | None:
        """How much of the phase is done."""
        if self.bytes_total is None:
            return None
        return round(100 * self.bytes_done / self.bytes_total, 2) if self.bytes_total else 100.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with ``message_type: status``."""
        return {"message_type": "status", **asdict(self), "percent": self.percent}

    def __str__(self) -> str:
        done = format_size(self.bytes_done)
        parts = [f"{done} of {format_size(self.bytes_total)} ({self.percent:.1f} %)" if self.bytes_total else done]
        if self.items_done or self.items_total:
            parts.append(f"{self.items_done} of {self.items_total} items" if self.items_total
                         else f"{self.items_done} items")
        parts += [f"{format_size(self.bytes_per_second)}/s", f"{_clock_text(self.seconds_elapsed)} gone"]
        if self.seconds_remaining is not None:
            parts.append(f"{_clock_text(self.seconds_remaining)} left")
        return f"{self.phase or 'starting'}: {', '.join(parts)}"


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(slots=True)
class _Phase:
    """Replaced as a whole, so that a reader never sees the counts of one phase under the name of another."""

    name: str
    total: int | None
    items_total: int | None
    samples: tuple[tuple[float, int], ...]
    """(time, bytes done), oldest first; replaced as a whole too."""
    done: int = 0
    items_done: int = 0


class Progress:
    """Counters of one job. Any thread may count; reading takes no lock, so a signal handler may read.

    It can be called with (bytes done, bytes in all), which is what `stasis.block.copy` wants.
    `on_error`: called for what went wrong without ending the job.
    """

    def __init__(self, *, on_error: Callable[[StasisError], None] | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._on_error = on_error
        self._lock = threading.Lock()
        self._started = clock()
        self._phase = _Phase("", None, None, ((self._started, 0),))

    def phase(self, name: str, total: int | None = None, *, items: int | None = None) -> None:
        """Begin the next phase, of `total` bytes and `items` devices, files or objects; None: not known."""
        with self._lock:
            self._phase = _Phase(name, total, items, ((self._clock(), 0),))

    def add(self, nbytes: int, *, items: int = 0) -> None:
        """Count work that was done."""
        with self._lock:
            self._phase.done += nbytes
            self._phase.items_done += items

    def skip(self, nbytes: int, *, items: int = 0) -> None:
        """Count work that an earlier run has done: it counts as done, but not into the rate."""
        with self._lock:
            self._phase.done += nbytes
            self._phase.items_done += items
            self._phase.samples = ((self._clock(), self._phase.done),)

    def expect(self, nbytes: int, *, items: int = 0) -> None:
        """Add to the total of this phase, where it becomes known bit by bit."""
        with self._lock:
            self._phase.total = (self._phase.total or 0) + nbytes
            self._phase.items_total = (self._phase.items_total or 0) + items or None

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            if self._phase.total is None:
                self._phase.samples = ((self._clock(), done),)  # it may continue an earlier one: the rate begins here
            self._phase.done, self._phase.total = done, total

    def error(self, error: StasisError) -> None:
        """Tell of an error that does not end the job, such as a chunk that cannot be read."""
        if self._on_error is not None:
            self._on_error(error)

    def status(self) -> Status:
        """How far the job is now."""
        phase, now = self._phase, self._clock()
        done, rate = phase.done, self._rate(phase, now)
        remaining = None
        if phase.total is not None and rate > 0:
            remaining = max(0, round((phase.total - done) / rate))
        return Status(phase.name, done, phase.total, phase.items_done, phase.items_total,
                      round(now - self._started, 3), int(rate), remaining)

    @staticmethod
    def _rate(phase: _Phase, now: float) -> float:
        samples = phase.samples
        recent = [sample for sample in samples[1:] if now - sample[0] < RATE_SECONDS]
        then, before = samples[len(samples) - len(recent) - 1]
        if now - samples[-1][0] >= RATE_SECONDS / 30:
            recent.append((now, phase.done))
        phase.samples = ((then, before), *recent)
        return (phase.done - before) / (now - then) if now > then else 0.0
