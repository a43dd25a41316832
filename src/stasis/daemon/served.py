# SPDX-License-Identifier: Apache-2.0
"""One attached device as the daemon sees it: its open origin, its listening sockets and its worker process.

The origin and the sockets belong to the daemon and are lent to the worker. When a worker dies, the next one gets the
same ones: nobody else can write to the origin in between, and clients that reconnect wait in the socket's queue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stasis.block.backing import refuse_origins
from stasis.block.opening import open_origin
from stasis.block.settings import Settings
from stasis.daemon import placing, sockets, statefile
from stasis.daemon.channel import Channel
from stasis.daemon.child import NICE_IN_PATH, Child, last_line, spawn
from stasis.daemon.paths import Directories
from stasis.daemon.record import DeviceRecord, OriginKey
from stasis.errors import DaemonError, NotFoundError, StasisError, StateError
from stasis.linux import blockdev
from stasis.nbd.uri import NbdUri

__all__ = ["Observer", "Resume", "ServedDevice"]

START_TIMEOUT = 60.0
STOP_TIMEOUT = 120.0
"""Seconds for a worker to make its map durable; a slow disk may have gigabytes of dirty pages to write."""


@dataclass(frozen=True)
class Resume:
    """The taken snapshot that a restarted worker goes on protecting."""

    uuid: str
    table: str
    chunk_shift: int
    storage: str
    storage_fd: int

    def as_config(self) -> dict[str, Any]:
        return dict(vars(self))


class Observer(Protocol):
    """Who is told what a worker reports; called from the device's own thread."""

    def worker_event(self, device: ServedDevice, event: Mapping[str, Any]) -> None: ...

    def worker_died(self, device: ServedDevice, child: Child) -> None: ...


class ServedDevice:
    """A device with its filter on. Not thread-safe: the keeper's lock is held around every call."""

    def __init__(self, record: DeviceRecord, key: OriginKey, directories: Directories, observer: Observer) -> None:
        self.record = record
        self.key = key
        self.size = 0
        self.node: dict[str, Any] | None = None
        """State of the kernel node, as its maker wants it back."""
        self.plugins: dict[str, Any] = {}
        """What rooms above the block engine add to its worker (block/plugins.py)."""
        self.failure: StasisError | None = None
        """Why the device is not served at the moment."""
        self._directories = directories
        self._observer = observer
        self._origin_fd = self._buffered_fd = -1
        self._listener: socket.socket | None = None
        self._tcp: sockets.TcpOptions | None = None
        self._tcp_listener: socket.socket | None = None
        self._adopted_tcp_uri: str | None = None
        self._events: Channel | None = None
        self._expected = threading.Event()
        self.child: Child | None = None
        self.channel: Channel | None = None

    # -- what it is -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def uri(self) -> str:
        return str(NbdUri(export=self.name, socket=str(self._directories.nbd_socket(self.name))))

    @property
    def tcp_uri(self) -> str | None:
        if self._tcp is None or self._tcp_listener is None:
            return self._adopted_tcp_uri
        host, port = self._tcp_listener.getsockname()[:2]
        return str(NbdUri(export=self.name, host=host, port=port, tls=self._tcp.tls))

    @property
    def origin_fd(self) -> int:
        return self._origin_fd

    @property
    def descriptors(self) -> dict[str, int | None]:
        """The origin's descriptors as configurations name them."""
        return {"origin_fd": self._origin_fd, "buffered_fd": self._buffered_fd if self._buffered_fd >= 0 else None}

    def refuse_storage(self, fd: int, name: str) -> None:
        """StorageError if a difference storage is the device or its node, or lies on one of them."""
        refuse_origins(fd, [os.fstat(self._origin_fd)], name)
        if self.node is not None:
            placing.refuse_above(fd, [str(self.node["node"])], name)

    @property
    def minimum_io_size(self) -> int:
        return blockdev.minimum_io_size(self._origin_fd) if self.key[0] == "block" else 0

    @property
    def is_gone(self) -> bool:
        """Whether the block device was removed under us: the kernel then says its size is 0."""
        fd = self._origin_fd  # the path, and with it the key, is not there to be asked
        if fd < 0 or not blockdev.is_block_device(fd):
            return False
        try:
            return blockdev.size(fd) == 0
        except OSError:
            return True

    def require(self) -> Channel:
        """The command connection to its worker. Raises the error that keeps the device from being served."""
        if self.is_gone:
            raise self._removed()
        if self.channel is None:
            raise self.failure or DaemonError(f"{self.name} is not served at the moment", hint="try again")
        return self.channel

    @property
    def trouble(self) -> StasisError | None:
        """Why the device is of no use at the moment; its worker answers errors if it was removed."""
        return self._removed() if self.is_gone else self.failure

    def _removed(self) -> NotFoundError:
        return NotFoundError(f"the block device {self.record.path} of {self.name} was removed", errno=errno.ENODEV,
                             hint=f"stasis device detach {self.name}, and attach it again when it is back")

    # -- start and stop ---------------------------------------------------------------------------

    def open(self) -> None:
        """Open the origin and the listening sockets. Raises what `open_origin` raises, or DaemonError."""
        self._open_listeners()
        opened = open_origin(self.record.path, buffered=self.record.buffered)
        try:
            self.size = opened.size
            self._origin_fd = os.dup(opened.fd)
            self._buffered_fd = os.dup(opened.buffered_fd) if opened.buffered_fd != opened.fd else -1
        finally:
            opened.close()

    def _open_listeners(self) -> None:
        if self._listener is None:
            self._listener = sockets.listen_unix(self._directories.nbd_socket(self.name))
        if self.record.tcp and self._tcp_listener is None:
            self._tcp = sockets.parse_address(self.record.tcp, self.record.tls_certificates, self.record.tls_psk)
            self._tcp_listener = sockets.listen_tcp(self._tcp)

    def start_worker(self, settings: Settings, *, continuity: bool, resume: Resume | None) -> None:
        """Start a worker and wait until it serves. Raises DaemonError with the last line of its log."""
        self._open_listeners()
        control = self._directories.worker_control(self.name)
        control.unlink(missing_ok=True)
        log = self._directories.log_of(self.name)
        lent = [fd for fd in (self._origin_fd, self._buffered_fd) if fd >= 0]
        lent += [sock.fileno() for sock in (self._listener, self._tcp_listener) if sock is not None]
        lent += [resume.storage_fd] if resume else []
        self.child = spawn("stasis.block.worker", self._configuration(settings, continuity, resume), lent, log,
                           nice=NICE_IN_PATH)
        try:
            self._save_runtime()
            self._connect(START_TIMEOUT)
        except BaseException:
            self.child.kill()
            self.child.close()
            self.child = None
            raise
        self.failure = None

    def _configuration(self, settings: Settings, continuity: bool, resume: Resume | None) -> dict[str, Any]:
        state = self._directories.device(self.name)
        return {
            "name": self.name,
            "path": self.record.path,
            "size": self.size,
            **self.descriptors,
            "listen_fd": self._listener.fileno() if self._listener else None,
            "tcp": self._tcp.as_config(self._tcp_listener) if self._tcp and self._tcp_listener else None,
            "control_path": str(self._directories.worker_control(self.name)),
            "inner_path": str(self._directories.worker_inner(self.name)),
            "log_path": str(self._directories.log_of(self.name)),
            "map_path": str(state / "map"),
            "intent_path": str(state / "intent"),
            "settings": settings.as_dict(),
            "tracking_block": self.record.tracking_block,
            "buffered": self.record.buffered,
            "contexts": self.record.bitmaps,
            "snapshot": resume.as_config() if resume else None,
            "continuity": continuity,
            "plugins": self.plugins,
        }

    def _connect(self, timeout: float) -> dict[str, Any]:
        """Connect to the worker, remember its process, and start to listen to its events."""
        self.channel = self._await_channel(time.monotonic() + timeout)
        hello = self.channel.call("hello")
        self.size = int(hello["size"])
        self._events = Channel.connect(self._directories.worker_control(self.name), self.name)
        self._events.subscribe()
        self._expected = threading.Event()  # each worker's own: an earlier one's thread may still be ending
        threading.Thread(target=self._watch, args=(self._events, self.child, self._expected),
                         name=f"watch-{self.name}", daemon=True).start()
        return hello

    def _await_channel(self, deadline: float) -> Channel:
        while True:
            try:
                return Channel.connect(self._directories.worker_control(self.name), self.name)
            except OSError as error:
                ended = self.child is None or self.child.wait(0.005)
                if ended or time.monotonic() > deadline:
                    raise self._not_started() from error

    def _not_started(self) -> DaemonError:
        log = self._directories.log_of(self.name)
        return DaemonError(f"the worker of {self.name} does not start: {last_line(log) or 'it said nothing'}",
                           hint=f"its log is {log}")

    def _watch(self, events: Channel, child: Child, expected: threading.Event) -> None:
        while (event := events.next_event()) is not None:
            self._observer.worker_event(self, event)
        events.close()
        if not expected.is_set():
            self._observer.worker_died(self, child)

    def stop_worker(self) -> None:
        """End the worker in order; its map is clean afterwards. A worker that does not answer is killed."""
        self._expected.set()
        if self.channel is not None:
            with contextlib.suppress(StasisError):
                self.channel.call("stop")
        if self.child is not None and not self.child.wait(STOP_TIMEOUT):
            self.child.kill()
        self.release_worker()

    def release_worker(self) -> None:
        """Let go of a worker, dead or not; one that runs goes on serving until somebody adopts it."""
        self._expected.set()
        if self._events is not None:
            self._events.shutdown()
        if self.channel is not None:
            self.channel.close()
        if self.child is not None:
            self.child.close()
        self._events = self.channel = self.child = None

    def close(self, *, remove: bool = True) -> None:
        """Give the origin and the sockets back; `remove` takes the socket files away too."""
        for fd in (self._origin_fd, self._buffered_fd):
            if fd >= 0:
                os.close(fd)
        self._origin_fd = self._buffered_fd = -1
        for sock in (self._listener, self._tcp_listener):
            if sock is not None:
                sock.close()
        self._listener = self._tcp_listener = None
        if remove:
            for path in (self._directories.nbd_socket(self.name), self._directories.worker_control(self.name),
                         self._directories.worker_inner(self.name), self._directories.runtime_of(self.name)):
                path.unlink(missing_ok=True)

    # -- adoption ---------------------------------------------------------------------------------

    def _save_runtime(self) -> None:
        """Note what a later daemon needs to adopt the worker."""
        assert self.child is not None
        statefile.write(self._directories.runtime_of(self.name), {
            "pid": self.child.pid, "start_time": self.child.start_time, "node": self.node, "tcp_uri": self.tcp_uri})

    def set_node(self, node: dict[str, Any] | None) -> None:
        """Remember the kernel node that was made for this device, or that there is none any more."""
        self.node = node
        if self.child is not None:
            self._save_runtime()

    def adopt(self) -> tuple[dict[str, Any], int | None]:
        """Take over the worker that an earlier daemon left: (its answer to hello, its storage descriptor or None).

        Raises DaemonError or OSError if there is none; then nothing has changed.
        """
        runtime = self._load_runtime()
        self.node, self._adopted_tcp_uri = runtime.get("node"), runtime.get("tcp_uri")
        self.child = Child.adopt(int(runtime.get("pid", 0)), runtime.get("start_time"))
        if self.child is None:
            raise DaemonError(f"the worker of {self.name} has ended")
        try:
            hello = self._connect(START_TIMEOUT)
            lent = self.require().descriptors()
        except BaseException:
            self.release_worker()
            raise
        self._origin_fd, self._buffered_fd = lent["origin"], lent.get("buffered", -1)
        self._listener = socket.socket(fileno=lent["listen"])
        return hello, lent.get("storage")

    def _load_runtime(self) -> dict[str, Any]:
        try:
            return statefile.read(self._directories.runtime_of(self.name), "remove it")
        except (FileNotFoundError, StateError) as error:
            raise DaemonError(f"no worker of {self.name} is known") from error

