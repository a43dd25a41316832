# SPDX-License-Identifier: Apache-2.0
"""Options that sockets of every family have (socket(7))."""

from __future__ import annotations

import socket
import struct

from stasis.process.images.schema.sockets import SkOptsEntry

__all__ = ["options_of", "set_options"]

# include/uapi/asm-generic/socket.h
SO_NO_CHECK, SO_PASSSEC, SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_BUF_LOCK = 11, 34, 32, 33, 72
SWITCHES = {
    "reuseaddr": socket.SO_REUSEADDR, "so_priority": socket.SO_PRIORITY, "so_rcvlowat": socket.SO_RCVLOWAT,
    "so_mark": socket.SO_MARK, "so_passcred": socket.SO_PASSCRED, "so_passsec": SO_PASSSEC,
    "so_dontroute": socket.SO_DONTROUTE, "so_no_check": SO_NO_CHECK, "so_reuseport": socket.SO_REUSEPORT,
    "so_broadcast": socket.SO_BROADCAST, "so_keepalive": socket.SO_KEEPALIVE, "so_oobinline": socket.SO_OOBINLINE,
}  # fmt: skip
BOOLEAN = {name for name in SWITCHES if name not in ("so_priority", "so_rcvlowat", "so_mark", "so_oobinline")}
TIMEVAL = struct.Struct("qq")
LINGER = struct.Struct("ii")


def options_of(sock: socket.socket) -> SkOptsEntry:
    """The message for what is set on a socket."""
    send, receive = (TIMEVAL.unpack(sock.getsockopt(socket.SOL_SOCKET, name, TIMEVAL.size))
                     for name in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO))  # fmt: skip
    entry = SkOptsEntry(
        so_sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        so_rcvbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        so_snd_tmo_sec=send[0], so_snd_tmo_usec=send[1], so_rcv_tmo_sec=receive[0], so_rcv_tmo_usec=receive[1],
    )  # fmt: skip
    for name, number in SWITCHES.items():
        value = _get(sock, number)
        if value:
            setattr(entry, name, bool(value) if name in BOOLEAN else value)
    on, seconds = LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER.size))
    entry.so_linger = seconds if on else None
    entry.so_buf_lock = _get(sock, SO_BUF_LOCK)
    return entry


def _get(sock: socket.socket, number: int) -> int | None:
    """None where this family or kernel does not have the option."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, number)
    except OSError:
        return None


def set_options(sock: socket.socket, entry: SkOptsEntry) -> None:
    """Set on a socket what was set on another one."""
    # The kernel doubles the sizes that it is given.
    sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, entry.so_sndbuf // 2)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, entry.so_rcvbuf // 2)
    if entry.so_buf_lock is not None and _get(sock, SO_BUF_LOCK) is not None:
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, entry.so_buf_lock)
    for name, seconds, microseconds in (
        (socket.SO_SNDTIMEO, entry.so_snd_tmo_sec, entry.so_snd_tmo_usec),
        (socket.SO_RCVTIMEO, entry.so_rcv_tmo_sec, entry.so_rcv_tmo_usec),
    ):
        if seconds or microseconds:
            sock.setsockopt(socket.SOL_SOCKET, name, TIMEVAL.pack(seconds, microseconds))
    for field, number in SWITCHES.items():
        value = getattr(entry, field)
        if value is not None and value != _get(sock, number):
            sock.setsockopt(socket.SOL_SOCKET, number, int(value))
    if entry.so_linger is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, entry.so_linger))
