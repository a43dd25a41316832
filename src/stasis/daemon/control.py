# SPDX-License-Identifier: Apache-2.0
"""The control socket: a varlink service with one thread per connection."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import varlink

import stasis
from stasis.daemon import sockets
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.engines import Engines
from stasis.daemon.interface import FILE, NAME
from stasis.daemon.service import Methods

__all__ = ["Server"]

LARGEST_CALL = 16 << 20
"""Bytes of one call; the largest honest one marks many ranges."""


class Server:
    """Serves from the moment it is made until `close`, at `path` or on a `listener` that somebody else made there."""

    def __init__(self, path: Path, engines: Engines, devices: DeviceKeeper,
                 stop: Callable[[bool], None], listener: socket.socket | None = None) -> None:
        service = varlink.Service(vendor="stasis", product="stasis", version=stasis.__version__,
                                  url="https://varlink.org", interface_dir=str(FILE.parent))
        service.interface(NAME)(lambda: Methods(engines, devices, stop))
        self._made = path if listener is None else None
        handler = type("Handler", (_Handler,), {"service": service})
        self._server = _Listener(listener or sockets.listen_unix(path), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept no more connections; calls that run go on in their threads."""
        if self._made is not None:
            self._made.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Listener(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Accepts connections on a unix socket that is ours alone: mode 0600 in a directory of mode 0700."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, handler: Any) -> None:
        super().__init__(listener.getsockname(), handler)
        self.socket = listener

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[Any, Any]:
        return self.socket.accept()

    def server_close(self) -> None:
        self.socket.close()

    def shutdown_request(self, request: Any) -> None:
        request.close()


class _Handler(socketserver.StreamRequestHandler):
    """One connection: calls separated by zero bytes, answered one after the other."""

    service: Any = None

    def handle(self) -> None:
        message = bytearray()
        try:
            while data := self.rfile.read1(1 << 16):
                message += data
                if len(message) > LARGEST_CALL:
                    return
                while (end := message.find(b"\0")) >= 0:
                    call = bytes(message[:end])
                    del message[: end + 1]
                    self._answer(call)
        except (ConnectionError, ValueError, AttributeError, TypeError):
            return  # the caller is gone, or what it sent is no varlink call

    def _answer(self, call: bytes) -> None:
        for reply in self.service.handle(call, _server=self.server, _request=self.request):
            if reply is not None:
                self.wfile.write(reply + b"\0")
