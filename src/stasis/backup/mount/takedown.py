# SPDX-License-Identifier: Apache-2.0
"""Taking a mounted backup apart: file system, block device, and what a process that died in between left.

Every step looks at what there is, so it can be begun by one process and finished by another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from errno import EBUSY, EINVAL, ENOENT
from pathlib import Path

from stasis.backup.mount.record import Record
from stasis.block import frontend
from stasis.block.frontend.node import wait_until
from stasis.errors import BusyError, StasisError
from stasis.linux import loop, mounts, process

__all__ = ["is_mounted", "take_apart", "take_apart_when_unused", "unmount"]

log = logging.getLogger(__name__)

HELPERS = ("nbdfuse", "nbdublk")
END_WAIT = 10.0
SHORTEST_PAUSE = 1 / 64
"""Seconds; mostly the last user of the device, umount itself, lets go a moment later."""
LONGEST_PAUSE = 2.0


def is_mounted(record: Record) -> bool:
    """Whether the file system is mounted, here or at a place to which somebody moved or bound it."""
    return bool(_mounts(record))


def _mounts(record: Record) -> list[mounts.Mount]:
    if record.node is None or not frontend.is_present(record.node):
        return []
    nodes = _nodes(record.node["node"])
    numbers = [_number(node) for node in nodes]  # btrfs shows an anonymous number, but the device as its source
    return [mount for mount in mounts.mounts() if mount.device in numbers or mount.source in nodes]


def _nodes(node: str) -> list[str]:
    """The device and its partitions."""
    return [node, *(f"/dev/{path.name}" for path in Path("/sys/class/block").glob(f"{os.path.basename(node)}p*"))]


def _number(node: str) -> int | None:
    try:
        return os.stat(node).st_rdev
    except FileNotFoundError:
        return None


def unmount(record: Record, *, lazily: bool) -> None:
    """Unmount it everywhere. `lazily`: where it is in use, take it out of sight; else raise OSError(EBUSY)."""
    for mount in reversed(_mounts(record)):
        try:
            mounts.unmount(mount.target)
        except OSError as error:
            if error.errno == EBUSY and lazily:
                mounts.unmount(mount.target, lazily=True)
            elif error.errno not in (EINVAL, ENOENT):
                raise


def take_apart(record: Record) -> None:
    """All but the file system, which must be unmounted. BusyError while something uses the device."""
    if record.boot == process.boot_id():
        if record.node is not None:
            frontend.disconnect(record.node)
        _remove_remains(record)
    record.remove()


def take_apart_when_unused(record: Record) -> None:
    """Unmount it, lazily where it is in use, and take it apart once nobody uses it any more, however long that is."""
    pause = SHORTEST_PAUSE
    while True:
        try:
            unmount(record, lazily=True)
            take_apart(record)
            return
        except (StasisError, OSError) as error:
            if pause == LONGEST_PAUSE / 2:
                log.warning("waiting to give back the device of %s: %s", record.target, error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _remove_remains(record: Record) -> None:
    """What a process left that died while it made the block device, before it could write down its state."""
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it goes by itself just now
            if device.read_text().startswith(f"{record.node_directory}/"):
                loop.detach(f"/dev/{device.parts[3]}")
    for mount in reversed(mounts.mounts()):
        if mount.target.startswith(f"{record.node_directory}/"):
            mounts.unmount(mount.target, lazily=True)
    for pid in _helpers(str(record.node_directory), str(record.socket)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not wait_until(lambda: not _helpers(str(record.node_directory), str(record.socket)), END_WAIT):
        raise BusyError(f"the program that carries the device of {record.target} does not end")


def _helpers(*marks: str) -> list[int]:
    """Processes that carry our device: their command lines name our own directory."""
    return [
        pid for pid in process.processes()
        if process.name(pid) in HELPERS and any(mark in _command_line(pid) for mark in marks)
    ]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
