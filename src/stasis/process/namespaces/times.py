# SPDX-License-Identifier: Apache-2.0
"""Time namespaces (time_namespaces(7)): what the monotonic clock and that of the time since boot say in them. Both go
on from there after a restore."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stasis.linux import procfs
from stasis.linux.namespaces import FLAGS, join, unshare
from stasis.process.images.schema.common import Timespec
from stasis.process.images.schema.namespaces import TimensEntry

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "write"]

SECOND = 10**9
CLOCKS = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}


def check(root: int, findings: Findings) -> None:
    """All of it can be kept."""


def _offsets(pid: int) -> dict[str, int]:
    """Nanoseconds that are added to each clock of the system for a process."""
    lines = procfs.read(pid, "timens_offsets").decode().splitlines()
    words = [line.split() for line in lines]
    return {name: int(seconds) * SECOND + int(nanoseconds) for name, seconds, nanoseconds in words}


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """What the clocks say."""
    ours, theirs = _offsets(procfs.SELF), _offsets(root)
    values = {name: time.clock_gettime_ns(clock) - ours[name] + theirs[name] for name, clock in CLOCKS.items()}
    out.write("timens", TimensEntry(**{name: _timespec(value) for name, value in values.items()}), number=number)
    return []


def _timespec(value: int) -> Timespec:
    return Timespec(tv_sec=value // SECOND, tv_nsec=value % SECOND)


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """A namespace in which the clocks go on."""
    is_older = not chain[0].has("timens", number)  # a set of ours had the number 0 for the tree's first process
    found: TimensEntry = chain[0].one("timens", 0 if is_older else number)
    ours = _offsets(procfs.SELF)
    unshare(FLAGS["time"])
    for name, clock in CLOCKS.items():
        wanted: Timespec = getattr(found, name)
        value = wanted.tv_sec * SECOND + wanted.tv_nsec
        offset = value - (time.clock_gettime_ns(clock) - ours[name])
        procfs.write(procfs.SELF, "timens_offsets", f"{name} {offset // SECOND} {offset % SECOND}\n")
    join("/proc/self/ns/time_for_children", FLAGS["time"])
