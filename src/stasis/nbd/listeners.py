# SPDX-License-Identifier: Apache-2.0
"""Sockets for NBD: where a server listens, and how a connection is tuned."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat

from stasis.errors import BusyError, UsageError
from stasis.nbd.replies import LIMIT

__all__ = ["set_socket_options", "tcp_listener", "turn_limit", "unix_listener"]

_SOCKET_BUFFER = 4 << 20
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_SO_RCVBUFFORCE = 33
_UNIX_PATH_MAX = 107  # sockaddr_un.sun_path is 108 bytes, one of them the final zero
_BACKLOG = 64
_TURN_MINIMUM = 64 << 10


def set_socket_options(sock: socket.socket) -> None:
    """Buffers that hold a turn, and no delay on TCP.

    Measured with our client, one read of 1 MiB at a time: 1.0 GiB/s with the default buffers, 2.8 GiB/s with 4 MiB.
    The FORCE forms pass the system's limit, where the process may.
    """
    for force, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, _SOCKET_BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BUFFER)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # the client may be gone by now; the next receive tells
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def turn_limit(sock: socket.socket) -> int:
    """Bytes of replies to make at once for this socket: what it takes without a wait.

    Measured with nbdcopy of 1 GiB through buffers of 208 KiB, the default limit of the system: 0.20 s of CPU with
    128 KiB a turn, 0.35 s with 1 MiB, most of which has to be kept and sent in parts. The kernel reports twice the size
    that was set, for its bookkeeping.
    """
    return max(_TURN_MINIMUM, min(LIMIT, sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 3))


def unix_listener(path: str) -> socket.socket:
    """Listen at `path`, mode 0600. A socket that a dead process left there is replaced.

    Raises UsageError when the path is too long, BusyError when somebody listens there or it is no socket.
    """
    if len(os.fsencode(path)) > _UNIX_PATH_MAX:
        raise UsageError(
            f"socket path {path} is longer than {_UNIX_PATH_MAX} bytes", hint="choose a shorter run directory"
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode of the socket is what fchmod set before bind: there is no moment at which others may
        # connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BusyError(f"{path} exists and is no socket", errno=errno.EEXIST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise BusyError(f"another server listens on {path}", errno=errno.EADDRINUSE)


def tcp_listener(host: str, port: int, *, encrypted: bool) -> socket.socket:
    """Listen on TCP. Raises UsageError for an address that is not loopback, unless TLS protects the
    exports."""
    family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    if not encrypted and not ipaddress.ip_address(address[0]).is_loopback:
        raise UsageError(
            f"{host or address[0]} can be reached from other machines and TLS is not configured",
            hint="give certificates or a PSK file, or listen on 127.0.0.1",
        )
    return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
