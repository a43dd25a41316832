# SPDX-License-Identifier: Apache-2.0
"""Tracers of devices with a kernel node follow its mounts, as dattobd's do: dormant after the unmount or a remount
read-only, active from the next mount that writes.

What is seen here is a hint and no more. Mounts of other namespaces are not seen, and programs may write to a node that
is not mounted; so the worker ends the rest by itself at the first write (stasis.datto.resting). Nothing rests that was
not seen mounted before.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stasis.daemon import nodes
from stasis.errors import StasisError
from stasis.linux import blockdev, mounts

if TYPE_CHECKING:
    from stasis.daemon.datto_pins import PinWatch
    from stasis.daemon.served import ServedDevice
    from stasis.datto.record import TracerRecord
    from stasis.datto.registry import Backend, Registry

__all__ = ["MountWatch", "is_in_use"]

MOUNTS = "/proc/self/mountinfo"
QUIET = 2.0
"""Seconds of rest after which an unmount is over: a mount goes from the list before its file system is written out."""
SHORTEST, LONGEST = 0.1, 2.0
"""Seconds between two looks while an unmount is not over."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seen:
    """What was seen of a tracer's device: mounted for writing; since then unmounted, but perhaps not all written."""

    mounted: bool = False
    pending: bool = False
    rested: float = 0.0


class MountWatch:
    """A thread that looks whenever the kernel says that mounts changed (proc_pid_mountinfo(5): POLLPRI)."""

    def __init__(self, registry: Registry, backend: Backend, devices: Mapping[str, ServedDevice],
                 lock: threading.RLock, pins: PinWatch) -> None:
        self._registry, self._backend, self._devices, self._lock = registry, backend, devices, lock
        self._pins = pins
        self._seen: dict[int, _Seen] = {}
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="datto-mounts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The daemon ends."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _run(self) -> None:
        with open(MOUNTS, "rb") as file:
            poll = select.poll()
            poll.register(file.fileno(), select.POLLPRI)
            poll.register(self._stop, select.POLLIN)
            pause = SHORTEST
            while True:
                found = poll.poll(pause * 1000 if self._is_pending else None)
                if any(fd == self._stop for fd, _ in found):
                    return
                pause = SHORTEST if found else min(2 * pause, LONGEST)
                with self._lock:
                    self.look()

    @property
    def _is_pending(self) -> bool:
        return any(seen.pending for seen in self._seen.values())

    def look(self) -> None:
        """Bring every tracer to where its mounts want it. With the lock."""
        for minor in self._seen.keys() - self._registry.tracers.keys():
            del self._seen[minor]
        for minor, record in self._registry.tracers.items():
            device = self._devices.get(record.device or "")
            if record.error or device is None or device.node is None:
                self._seen.pop(minor, None)
                continue
            try:
                self._follow(record, device.name, is_in_use(str(nodes.path_of(device.node))))
            except (StasisError, OSError) as error:
                log.warning("tracer %d does not follow the mounts of %s: %s", minor, device.name, error)
        self._pins.look(self._devices)

    def _follow(self, record: TracerRecord, device: str, in_use: bool) -> None:
        seen = self._seen.setdefault(record.minor, _Seen())
        if in_use:
            seen.mounted, seen.pending = True, False
            if record.resting:
                self._registry.woke(record, self._backend.ask(device, "wake"))
            return
        if seen.mounted:
            seen.mounted, seen.pending = False, True
        if not seen.pending:
            return
        if record.resting and time.monotonic() - seen.rested >= QUIET:
            seen.pending = False
        elif record.state.is_active and self._backend.ask(device, "rest").get("rests"):
            seen.rested = time.monotonic()
            self._registry.rested(record)


def is_in_use(node: str) -> bool:
    """Whether a file system that can be written is mounted from a block device or its partitions, or a device is
    stacked on one of them. Raises OSError."""
    rdev = os.stat(node).st_rdev
    numbers = {rdev, *mounts.relatives(rdev)}
    return any(_has_holders(number) or any(not mount.read_only for mount in mounts.mounts_of(number))
               for number in numbers)


def _has_holders(rdev: int) -> bool:
    """Whether a device lies on this one, which may be mounted in its turn."""
    try:
        return bool(os.listdir(blockdev.sysfs_path(rdev) / "holders"))
    except OSError:
        return False
