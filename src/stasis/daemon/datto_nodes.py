# SPDX-License-Identifier: Apache-2.0
"""Block devices for the images of tracers: where a device has a kernel node, its snapshot has one too, and the name
/dev/dattoN leads to it if nothing else has that name.

A node holds the image open. So it is taken apart before anything that ends the image, unless somebody uses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from stasis.daemon import nodes
from stasis.daemon.paths import Directories
from stasis.errors import BusyError, StasisError
from stasis.nbd.uri import NbdUri

if TYPE_CHECKING:
    from stasis.daemon.served import ServedDevice
    from stasis.datto.record import TracerRecord
    from stasis.datto.registry import Backend, Registry

__all__ = ["TracerNodes"]

DEVICES = "/dev"
CLOSE_SECONDS = 10.0
"""How long a node that was taken apart may take until its connection has ended."""

log = logging.getLogger(__name__)


class TracerNodes:
    """The nodes of all tracers. `lock` is the daemon's; `settle` is called without it."""

    def __init__(self, directories: Directories, registry: Registry, backend: Backend,
                 devices: Mapping[str, ServedDevice], lock: threading.RLock) -> None:
        self._directories, self._registry, self._backend = directories, registry, backend
        self._devices, self._lock = devices, lock
        self._making = threading.Lock()
        self._servers: dict[int, int | None] = {}
        """By minor: the worker that serves the node."""
        self._failed: dict[int, str] = {}

    # -- making -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Make the nodes that are missing, and connect those whose worker is another by now."""
        with self._making:
            with self._lock:
                for record in self._registry.tracers.values():
                    if record.error and record.state.is_unverified:
                        self._abandon(record)  # its image is not served again
                wanted = [minor for minor, record in self._registry.tracers.items() if self._is_wanted(record)]
            for minor in wanted:
                self._settle_one(minor)

    def _is_wanted(self, record: TracerRecord) -> bool:
        device = self._devices.get(record.device or "")
        has_image = record.state.is_snapshot and (record.state.is_active or record.resting)
        return device is not None and device.node is not None and has_image and not record.error

    def _settle_one(self, minor: int) -> None:
        with self._lock:
            record = self._registry.tracers.get(minor)
            if record is None or not self._is_wanted(record):
                return
            device = self._devices[str(record.device)]
            pid = device.child.pid if device.child else None
            if record.node is not None and self._is_good(record, pid):
                return
            size, address = device.size, self._directories.nbd_socket(f"datto{minor}")
        try:
            state = nodes.make(str(NbdUri(export=f"datto{minor}", socket=str(address))), size, f"datto{minor}",
                               self._directories)
        except (StasisError, OSError) as error:
            if self._failed.get(minor) != str(error):
                log.warning("the snapshot datto%d has no kernel node: %s", minor, error)
            self._failed[minor] = str(error)
            return
        with self._lock:
            if self._registry.tracers.get(minor) is not record or not self._is_wanted(record):
                nodes.abandon(state)
                return
            record.node, self._servers[minor] = state, pid
            _link(minor, str(state["node"]))
            self._backend.changed()

    def _is_good(self, record: TracerRecord, pid: int | None) -> bool:
        """Whether the node is the one that was made, and leads to this worker; if not, it is gone."""
        assert record.node is not None
        if nodes.is_present(record.node):
            known = self._servers.setdefault(record.minor, pid)
            if known == pid or nodes.reconnect(record.node):
                self._servers[record.minor] = pid
                return True
        self._abandon(record)
        return False

    @contextlib.contextmanager
    def none_is_made(self) -> Iterator[None]:
        """No node is being made, which would have its image open before anybody knows of it. Not with the lock."""
        with self._making:
            yield

    # -- taking apart -------------------------------------------------------------------------------------

    def release(self, minor: int) -> None:
        """Take the node of a tracer apart. BusyError (EBUSY) if somebody uses it."""
        with self._lock:
            record = self._registry.tracers.get(minor)
            if record is None or record.node is None:
                return
            try:
                nodes.remove(record.node)
            except BusyError as error:
                raise BusyError(f"the image datto{minor} is in use: {error.message}", hint=error.hint) from error
            self._forget(record)
            self._await_end(record)

    def release_device(self, name: str) -> None:
        """Take apart the node of the tracer of a device. BusyError if somebody uses it."""
        for minor, record in self._registry.tracers.items():
            if record.device == name:
                self.release(minor)

    def is_in_use(self, name: str) -> bool:
        """Whether the node of a device's tracer is in use; it is taken apart otherwise."""
        try:
            self.release_device(name)
        except StasisError as error:
            log.warning("%s", error)
            return True
        return False

    def _await_end(self, record: TracerRecord) -> None:
        """The worker hears of the end of a connection a moment later."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(StasisError):
            while self._backend.ask(str(record.device), "info").get("open") and time.monotonic() < deadline:
                time.sleep(0.01)

    def _abandon(self, record: TracerRecord) -> None:
        if record.node is not None:
            nodes.abandon(record.node)
            self._forget(record)

    def _forget(self, record: TracerRecord) -> None:
        assert record.node is not None
        _unlink(record.minor, str(record.node["node"]))
        record.node = None
        self._servers.pop(record.minor, None)
        self._backend.changed()


def _link(minor: int, node: str) -> None:
    """/dev/dattoN, unless that is something else already."""
    path = f"{DEVICES}/datto{minor}"
    try:
        if os.path.islink(path) and not os.path.exists(path):
            os.unlink(path)  # of a node that is no more
        os.symlink(node, path)
    except OSError as error:
        log.warning("%s is not made: %s; the snapshot is %s", path, error.strerror, node)


def _unlink(minor: int, node: str) -> None:
    path = f"{DEVICES}/datto{minor}"
    with contextlib.suppress(OSError):
        if os.readlink(path) == node:
            os.unlink(path)
