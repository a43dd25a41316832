# SPDX-License-Identifier: Apache-2.0
"""Nodes of nbdfuse and a loop device: the export as a file in a FUSE file system, and that file as a block device.

It works on every kernel with FUSE and loop devices. The loop device uses direct I/O where the kernel lets it: then a
write that fails says so itself, and not the next flush, and a snapshot sees every write that was completed. A restarted
server cannot be connected again: nbdfuse does not try to.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

from stasis.block.frontend.helper import END_WAIT, START_WAIT, Helper, Shape, is_installed, refuse_reconnect
from stasis.block.frontend.node import Node, Wish, check_size, load_module, unused, wait_until
from stasis.errors import StasisError
from stasis.linux import loop, mounts

__all__ = ["KIND", "abandon", "connect", "disconnect", "is_present", "probe", "reconnect"]

KIND = "nbdfuse+loop"

PROGRAM = "nbdfuse"
FUSE = "/dev/fuse"
FILE = "disk"


def probe() -> bool:
    """Whether there are the program, FUSE and loop devices."""
    if not is_installed(PROGRAM):
        return False
    for module, node in (("fuse", FUSE), ("loop", loop.CONTROL)):
        if not os.path.exists(node):
            load_module(module)
        if not os.access(node, os.R_OK | os.W_OK):
            return False
    return True


def connect(wish: Wish) -> Node:
    """Mount the export as a file, then make the loop device of it."""
    shape = Shape.ask(wish)
    mountpoint = wish.directory / "fuse"
    mountpoint.mkdir(mode=0o700)
    helper = Helper.spawn([PROGRAM, *shape.options, str(mountpoint / FILE), str(wish.uri)], wish.directory)
    node = ""
    try:
        _wait_for_file(helper, mountpoint / FILE, shape.export_size, wish.directory)
        node = _attach(str(mountpoint / FILE), shape.sector, shape.size, shape.read_only)
        check_size(node, shape.size)
    except BaseException:
        if node:
            loop.detach(node)
        _end(helper, str(mountpoint))
        raise
    return Node.of(wish, KIND, node, mountpoint=str(mountpoint), **helper.as_state())


def _attach(file: str, sector: int, size: int, read_only: bool) -> str:
    try:
        return loop.attach(file, sector, size, read_only=read_only, direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:  # newer kernels say so; older ones go on without direct I/O
            raise
    return loop.attach(file, sector, size, read_only=read_only)


def _wait_for_file(helper: Helper, file: Path, size: int, directory: Path) -> None:
    def settled() -> bool:
        return file.exists() or not helper.runs()

    if not wait_until(settled, START_WAIT) or not helper.runs():
        raise StasisError(f"nbdfuse does not start: {Helper.last_words(directory) or 'no reason given'}")
    found = file.stat().st_size
    if found != size:
        raise StasisError(f"nbdfuse shows {found} bytes of an export of {size}")


def _end(helper: Helper, mountpoint: str) -> None:
    """Unmount, which ends nbdfuse; the last user of its file, the loop device, lets go a moment after its detach."""
    wait_until(lambda: _unmount(mountpoint), END_WAIT)
    helper.wait(END_WAIT)
    helper.end(END_WAIT)
    if os.path.ismount(mountpoint):
        raise StasisError(f"{mountpoint} cannot be unmounted", errno=errno.EBUSY)


def _unmount(mountpoint: str) -> bool:
    try:
        mounts.unmount(mountpoint)
    except OSError as error:
        return error.errno != errno.EBUSY  # EINVAL: not mounted; ENOENT: gone
    return True


def disconnect(state: dict[str, Any]) -> None:
    """Flush, detach the loop device, unmount."""
    node, mountpoint = state["node"], state["mountpoint"]
    file = os.path.join(mountpoint, FILE)
    if loop.is_attached(node, file):
        with unused(node, flush=Helper.of(state).runs()):
            loop.detach(node)  # is done when we, its last user, close it
        wait_until(lambda: not loop.is_attached(node, file), END_WAIT)
    _end(Helper.of(state), mountpoint)


def abandon(state: dict[str, Any]) -> None:
    """End the server of the file. The loop device goes with its last user, and fails their I/O until then."""
    node, mountpoint = state["node"], state["mountpoint"]
    if loop.is_attached(node, os.path.join(mountpoint, FILE)):
        with contextlib.suppress(OSError):  # its last user closed it meanwhile
            loop.detach(node)
    with contextlib.suppress(OSError):  # nbdfuse may have unmounted it
        mounts.unmount(mountpoint, lazily=True)
    Helper.of(state).end(END_WAIT)


def is_present(state: dict[str, Any]) -> bool:
    """Whether the loop device still is that of our file."""
    return loop.is_attached(state["node"], os.path.join(state["mountpoint"], FILE))


def reconnect(state: dict[str, Any]) -> None:
    refuse_reconnect(state, PROGRAM)
