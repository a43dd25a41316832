# SPDX-License-Identifier: Apache-2.0
"""What worker and image server have in common: their configuration, and the sockets they serve on."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from select import EPOLLIN
from typing import TYPE_CHECKING, Any

from stasis.block.settings import Settings
from stasis.block.sibling import Sibling
from stasis.linux.eventloop import EventLoop
from stasis.nbd.export import ExportSource
from stasis.nbd.server import Server

if TYPE_CHECKING:
    from stasis.nbd.tls import TlsConfig

MOST_DESCRIPTORS = 64


def read_config(arguments: list[str]) -> dict[str, Any]:
    """The JSON object behind --config-fd, which is closed; SystemExit where a socket ends without one.

    From a socket the descriptors that it names come with it.
    """
    parser = argparse.ArgumentParser(description="started by the stasis daemon")
    parser.add_argument("--config-fd", type=int, required=True)
    fd = parser.parse_args(arguments).config_fd
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with socket.socket(fileno=fd) as sock:
            return _received_config(sock)
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        config: dict[str, Any] = json.loads(file.read())
    return config


def _received_config(sock: socket.socket) -> dict[str, Any]:
    """A configuration that comes late, as `stasis.daemon.child.Prestarted` sends it."""
    text, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, MOST_DESCRIPTORS)
    while more := sock.recv(1 << 16):
        text += more
    if not text:
        raise SystemExit(0)
    message = json.loads(text)
    config: dict[str, Any] = _renumbered(message["configuration"], dict(zip(message["descriptors"], descriptors,
                                                                            strict=True)))
    return config


def _renumbered(value: Any, numbers: Mapping[int, int], name: str = "") -> Any:
    """The same with the numbers that descriptors have here: they are what names in `_fd` and `_fds` stand for."""
    if isinstance(value, dict):
        return {key: _renumbered(item, numbers, key) for key, item in value.items()}
    if name.endswith("_fds"):
        return [numbers[number] for number in value]
    return numbers[value] if name.endswith("_fd") and value is not None else value


def start_servers(
    loop: EventLoop,
    exports: ExportSource,
    config: dict[str, Any],
    settings: Settings,
    *,
    listen: bool = True,
    sibling: Sibling | None = None,
) -> list[Server]:
    """Serve on the unix socket that was inherited and, by option, on TCP sockets with TLS.

    Without `listen` clients come from elsewhere; `sibling` takes a share of them.
    """
    tcp = config.get("tcp") or {}
    kinds = [(None, [config["listen_fd"]])] + ([(_tls(tcp), tcp["listen_fds"])] if tcp else [])
    servers = []
    for number, (tls, fds) in enumerate(kinds):
        hand_over = None if sibling is None else functools.partial(sibling.take, server=number)
        server = Server(loop, exports, tls, max_connections=settings.nbd_maximum_connections, hand_over=hand_over)
        for fd in fds if listen else ():
            server.add_listener(socket.socket(fileno=os.dup(fd)))
        servers.append(server)
    return servers


def _tls(tcp: dict[str, Any]) -> TlsConfig | None:
    if not (tcp.get("certificates") or tcp.get("psk")):
        return None
    from stasis.nbd.tls import TlsConfig  # ssl takes 10 ms and 6 MiB that a unix socket does not need

    return TlsConfig(
        directory=Path(tcp["certificates"]) if tcp.get("certificates") else None,
        psk_file=Path(tcp["psk"]) if tcp.get("psk") else None,
    )


def listen_inner(loop: EventLoop, exports: ExportSource, path: str) -> Server:
    """Serve on a new unix socket of our own, mode 0600."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(16)
    server = Server(loop, exports)
    server.add_listener(listener)
    return server


def close_others(fds: Iterable[int]) -> None:
    """Close descriptors that came with a message and are not wanted."""
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def signals_stop(loop: EventLoop, stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop` from the loop, between batches."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def arrived(_events: int) -> None:
        reader.recv(64)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _nothing)
    # Python retries a wait that a signal interrupted; the descriptor that it writes to ends the wait.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    loop.register(reader.fileno(), EPOLLIN, arrived)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        reader.close()
        writer.close()


def _nothing(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells of the signal."""
