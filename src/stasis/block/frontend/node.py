# SPDX-License-Identifier: Apache-2.0
"""What all kinds of node share: what is wanted, what was made, and holding a node so that nobody uses it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stasis.errors import BusyError, StasisError, StateError
from stasis.linux import blockdev, mounts, process
from stasis.nbd.uri import NbdUri

log = logging.getLogger(__name__)

__all__ = ["MAXIMUM_SECTOR", "MINIMUM_SECTOR", "Node", "Wish", "check_size", "load_module", "unused", "wait_until"]

MINIMUM_SECTOR = 512
MAXIMUM_SECTOR = 4096
OPEN_GRACE = 2.0
"""Seconds in which a process that has the node open may close it: udev looks at every device that was written."""
POLL = 0.02


@dataclass(frozen=True)
class Wish:
    """What `connect` was asked for."""

    uri: NbdUri
    size: int | None
    name: str
    directory: Path
    sector: int | None
    read_only: bool

    def expect(self, size: int) -> None:
        """Raise StateError if the export has another size in bytes than whoever wants the node believes."""
        if self.size not in (None, size):
            raise StateError(f"{self.uri} has {size} bytes where {self.size} were expected")

    def sector_for(self, minimum_block: int) -> int:
        """The wanted logical block size in bytes, or the smallest one that fits the export."""
        return self.sector or min(max(minimum_block, MINIMUM_SECTOR), MAXIMUM_SECTOR)


@dataclass(frozen=True)
class Node:
    """A block device node; `state` is what takes it apart, plain values for JSON."""

    path: str
    kind: str
    state: dict[str, Any]

    @classmethod
    def of(cls, wish: Wish, kind: str, path: str, **more: Any) -> Node:
        common = {
            "kind": kind,
            "node": path,
            "uri": str(wish.uri),
            "name": wish.name,
            "directory": str(wish.directory),
            "boot": process.boot_id(),
        }
        return cls(path, kind, common | more)


def load_module(name: str) -> None:
    """Have a kernel module loaded if we may; whether that helped is seen by what it should have brought."""
    if os.geteuid() == 0:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["modprobe", "-q", name], capture_output=True, check=False)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds; False if it does not within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def check_size(node: str, expected: int) -> None:
    """Raise StasisError if the device does not have that many bytes. Opening it has its partitions scanned."""
    with open(node, "rb", buffering=0) as device:
        found = blockdev.size(device.fileno())
    if found != expected:
        raise StasisError(f"{node} has {found} bytes where {expected} were expected")


@contextlib.contextmanager
def unused(node: str, *, flush: bool = True) -> Iterator[None]:
    """Hold the node exclusively while the block runs; what was written to it is flushed first.

    Raises BusyError naming who uses it. An exclusive open keeps mounts, swap and stacked devices away; plain opens
    are only looked for.
    """
    device = _claim(node)
    try:
        if flush:
            _flush(device, node)
        yield
    finally:
        os.close(device)


def _flush(device: int, node: str) -> None:
    """A node whose server is gone cannot be flushed, and must be possible to take apart all the same."""
    try:
        os.fsync(device)
    except OSError as error:
        log.warning("%s: what was written to it last may be lost: %s", node, error.strerror)


def _claim(node: str) -> int:
    deadline = time.monotonic() + OPEN_GRACE
    while True:
        device = _open_exclusively(node)
        users = mounts.holders_of(os.fstat(device).st_rdev)
        if not users:
            return device
        os.close(device)
        if time.monotonic() > deadline:
            raise _busy(node, users)
        time.sleep(POLL)


def _open_exclusively(node: str) -> int:
    try:
        return os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise _busy(node, mounts.holders_of(os.stat(node).st_rdev)) from error


def _busy(node: str, users: list[str]) -> BusyError:
    who = ", ".join(users) or "held by another program"
    return BusyError(f"{node} is in use: {who}", hint="unmount it, or end what uses it, and try again")
