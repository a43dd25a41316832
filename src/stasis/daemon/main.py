# SPDX-License-Identifier: Apache-2.0
"""The daemon's life: one per run directory, recover, serve the control API, stop in order."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stasis.blksnap.kernel import Kernel
from stasis.daemon import control, nodes, sockets
from stasis.daemon.child import NICE_IN_PATH, set_priority
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.driven.engine import DrivenEngine
from stasis.daemon.engines import Engines, ServedEngine
from stasis.daemon.paths import Directories, check_socket_path
from stasis.daemon.recovery import recover
from stasis.daemon.snapshots import SnapshotKeeper
from stasis.daemon.tracers import TracerKeeper
from stasis.errors import DaemonError, StasisError
from stasis.linux import activation

__all__ = ["Daemon", "run", "set_up_logging"]

log = logging.getLogger("stasis.daemon")


class Daemon:
    """The keepers under their one lock."""

    def __init__(self, directories: Directories, overrides: dict[str, Any], kernel: Kernel | None = None) -> None:
        """`kernel` is what modules are driven through, the running one where none is given."""
        lock = threading.RLock()
        self.devices = DeviceKeeper(directories, lock, overrides)
        self.snapshots = SnapshotKeeper(directories, self.devices, lock)
        self.devices.memberships = self.snapshots
        self.driven = DrivenEngine(directories, lock, kernel)
        self.engines = Engines(ServedEngine(self.devices, self.snapshots), self.driven)
        self.devices.tracers = self.tracers = TracerKeeper(directories, self.devices)
        self.stopped = threading.Event()
        self.keep_serving = False

    def stop(self, keep_serving: bool) -> None:
        """Ask the main thread to end the daemon."""
        self.keep_serving = keep_serving
        self.stopped.set()

    def shut_down(self) -> None:
        """Stop serving and leave clean maps; devices that must not stop are left to their workers.

        These are all with `keep_serving`, else those whose kernel node is in use: taking the server from under a
        mounted file system would lose its data. A snapshot stays with any of its devices.
        """
        self.tracers.close()
        self.driven.shut_down(keep=self.keep_serving)
        with self.devices.lock:
            kept = self._kept()
            for snapshot in list(self.snapshots.snapshots.values()):
                if kept.isdisjoint(snapshot.members):
                    self.snapshots.remove(snapshot)
                else:
                    self.snapshots.let_go(snapshot)
            for device in self.devices.devices.values():
                self.devices.let_go(device, keep_worker=device.name in kept)

    def _kept(self) -> set[str]:
        if self.keep_serving:
            return set(self.devices.devices)
        kept = {name for name, device in self.devices.devices.items()
                if self.tracers.nodes.is_in_use(name)
                or (device.node is not None and not nodes.remove_if_unused(device.node))}
        for snapshot in self.snapshots.snapshots.values():
            if not kept.isdisjoint(snapshot.members):
                kept.update(snapshot.members)
        for name in kept:
            log.warning("%s is in use through its kernel node; its worker goes on", name)
        return kept


@contextlib.contextmanager
def _only_one(directories: Directories) -> Iterator[None]:
    """Hold the lock of the run directory; DaemonError (EBUSY) names the daemon that has it."""
    fd = os.open(directories.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode().strip() or "?"
            raise DaemonError(f"a daemon runs on {directories.run} already, with pid {owner}", errno=errno.EBUSY,
                              hint="use it, or choose another --run-dir") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def run(directories: Directories, *, overrides: dict[str, Any] | None = None, ready_fd: int | None = None) -> None:
    """Be the daemon until SIGTERM, SIGINT or the method Stop. Raises DaemonError and its kin if it cannot start.

    `overrides` are settings that go before those of the state directory. With `ready_fd` the daemon goes into the
    background, and tells there, as JSON, that it serves or why it cannot.
    """
    if ready_fd is not None and os.fork():
        os._exit(0)  # whoever started us waits for this process only
    try:
        os.umask(0o077)
        check_socket_path(directories.control_socket)
        directories.create()
        with _only_one(directories):
            _serve(Daemon(directories, overrides or {}), directories.control_socket, ready_fd)
    except StasisError as error:
        _tell(ready_fd, error.as_dict())
        raise


def _serve(daemon: Daemon, socket_path: Path, ready_fd: int | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop(False))
    listener = sockets.passed_in(socket_path)
    set_priority(0, NICE_IN_PATH)
    with daemon.devices.lock:  # what watches nodes and mounts runs already
        recover(daemon.devices, daemon.snapshots)
        daemon.driven.recover()
    server = control.Server(socket_path, daemon.engines, daemon.devices, daemon.stop, listener)
    log.info("serving on %s", socket_path)
    _tell(ready_fd, {"pid": os.getpid()})
    activation.notify("READY=1")
    daemon.stopped.wait()
    activation.notify("STOPPING=1")
    server.close()
    daemon.shut_down()
    log.info("stopped")


def _tell(ready_fd: int | None, message: dict[str, Any]) -> None:
    if ready_fd is None:
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(ready_fd, json.dumps(message).encode() + b"\n")
    os.close(ready_fd)


def set_up_logging() -> None:
    """Log to standard error, a line per message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
