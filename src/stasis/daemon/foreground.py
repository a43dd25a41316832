# SPDX-License-Identifier: Apache-2.0
"""Serving one device in the foreground, without daemon, change map or snapshots, as `nbdkit -f` serves a file.

With LISTEN_FDS the sockets come from who started us: `nbdinfo [ stasis device serve disk.img ]`.
"""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from stasis.block.exports import OriginExport
from stasis.block.opening import open_origin
from stasis.daemon import sockets
from stasis.errors import UsageError
from stasis.linux import activation
from stasis.linux.eventloop import EventLoop
from stasis.nbd.export import ExportList
from stasis.nbd.server import Server

__all__ = ["serve"]


def serve(path: str, *, export: str, socket_path: str | None, buffered: bool) -> None:
    """Serve until SIGTERM or SIGINT; then everything written is durable. Raises what `open_origin` raises."""
    listeners = [socket.socket(fileno=fd) for fd, _ in activation.listen_fds()]
    made = None
    if socket_path is not None:
        made = Path(socket_path).absolute()
        listeners.append(sockets.listen_unix(made))
    if not listeners:
        raise UsageError("no socket to listen on", hint="add --socket PATH, or start it by socket activation")
    try:
        _serve(path, export, listeners, buffered)
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _serve(path: str, export: str, listeners: list[socket.socket], buffered: bool) -> None:
    origin = open_origin(path, buffered=buffered)
    with EventLoop() as loop:
        server = Server(loop, ExportList(OriginExport(export, origin, None)))
        for listener in listeners:
            server.add_listener(listener)
        _run_until_signal(loop, loop.stop)
        server.close()
        origin.flush()
    origin.close()


def _run_until_signal(loop: EventLoop, stop: Callable[[], None]) -> None:
    """Run the loop; a signal writes to a socket that the loop watches, since Python retries an interrupted wait."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop())
        loop.register(reader.fileno(), select.EPOLLIN, lambda _: _drain(reader))
        loop.run()
        signal.set_wakeup_fd(before)


def _drain(reader: socket.socket) -> None:
    reader.recv(64)
