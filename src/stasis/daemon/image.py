# SPDX-License-Identifier: Apache-2.0
"""The image server process of one device of a taken snapshot, kept running."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stasis.daemon import sockets
from stasis.daemon.child import Child, Prestarted, last_line, spawn
from stasis.errors import DaemonError

__all__ = ["ImageServer"]

STOP_TIMEOUT = 5.0
QUICK_DEATH = 1.0
"""A server that lives shorter than this many seconds is restarted ever more slowly."""
LONGEST_PAUSE = 5.0

log = logging.getLogger(__name__)


class ImageServer:
    """Starts the image server, and again when it dies; its listening socket stays, so clients only wait.

    An image server holds no state of its own: chunk table and difference storage are the state.
    """

    def __init__(self, export: str, socket_path: Path, log_path: Path, tcp: sockets.TcpOptions | None,
                 started: Callable[[Child], None], module: str = "stasis.block.imageserver") -> None:
        """`started` is told of every process that serves, in whatever thread starts it; `module` is what it runs."""
        self.export = export
        self.child: Child | None = None
        self.tcp = tcp
        self._started = started
        self._module = module
        self._socket_path = socket_path
        self._log_path = log_path
        self._listener: socket.socket | None = None
        self._tcp_listener: socket.socket | None = None
        self._configuration: dict[str, Any] = {}
        self._descriptors: list[int] = []
        self._prestarted: Prestarted | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def listen(self) -> None:
        """Make the listening sockets; clients may connect from now on. Raises DaemonError."""
        if self._listener is None:
            self._listener = sockets.listen_unix(self._socket_path)
        if self.tcp is not None and self._tcp_listener is None:
            self._tcp_listener = sockets.listen_tcp(self.tcp)

    @property
    def tcp_address(self) -> tuple[str, int] | None:
        """Where it listens on TCP, the port that the kernel chose included."""
        return None if self._tcp_listener is None else self._tcp_listener.getsockname()[:2]

    def prestart(self) -> None:
        """Have a process load what serving takes, for a `start` that comes soon. Without one `start` takes longer."""
        with contextlib.suppress(DaemonError):
            self._prestarted = Prestarted(self._module, self._log_path)

    def start(self, configuration: dict[str, Any], descriptors: list[int]) -> None:
        """Start serving. The descriptors must stay open as long as this object serves. Raises DaemonError."""
        self._configuration, self._descriptors = configuration, descriptors
        self._spawn()

    def adopt(self, child: Child, configuration: dict[str, Any], descriptors: list[int]) -> None:
        """Watch a server that an earlier daemon started; a later one is started as `start` would have."""
        self._configuration, self._descriptors = configuration, descriptors
        self.child = child
        self._watch(child)

    def _spawn(self) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            self.listen()
            assert self._listener is not None
            tcp = self.tcp.as_config(self._tcp_listener) if self.tcp and self._tcp_listener else None
            configuration = {**self._configuration, "name": self.export, "listen_fd": self._listener.fileno(),
                             "log_path": str(self._log_path), "tcp": tcp}
            lent = [self._listener.fileno()] + ([self._tcp_listener.fileno()] if self._tcp_listener else [])
            child = self._child(configuration, [*self._descriptors, *lent])
            self.child = child
        self._started(child)  # without our lock: whoever stops us may hold the one that this takes
        self._watch(child)

    def _child(self, configuration: dict[str, Any], descriptors: list[int]) -> Child:
        prestarted, self._prestarted = self._prestarted, None
        child = None if prestarted is None else prestarted.go(configuration, descriptors)
        return child or spawn(self._module, configuration, descriptors, self._log_path)

    def _watch(self, child: Child) -> None:
        threading.Thread(target=self._keep_running, args=(child,), name=f"watch-{self.export}", daemon=True).start()

    def _keep_running(self, child: Child) -> None:
        started, pause = time.monotonic(), 0.0
        child.wait()
        if time.monotonic() - started < QUICK_DEATH:
            pause = QUICK_DEATH
        self._forget(child)
        while not self._stopped.wait(pause):
            log.error("the image server of %s ended (%s); starting it again", self.export, last_line(self._log_path))
            try:
                self._spawn()
                return
            except DaemonError as error:
                log.error("%s", error)
                pause = min(LONGEST_PAUSE, 2 * pause + 0.1)

    def _forget(self, child: Child) -> None:
        with self._lock:  # whoever stops us may be waiting for its end
            child.close()
            self.child = None

    def stop(self, *, keep_process: bool = False) -> None:
        """End the server and remove its socket; open connections end. `keep_process` leaves it for a later daemon."""
        with self._lock:
            self._stopped.set()
            if self._prestarted is not None:
                self._prestarted.close()
                self._prestarted = None
            if self.child is not None and not keep_process:
                self.child.stop(STOP_TIMEOUT)
            for sock in (self._listener, self._tcp_listener):
                if sock is not None:
                    sock.close()
        if not keep_process:
            self._socket_path.unlink(missing_ok=True)
