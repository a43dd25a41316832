# SPDX-License-Identifier: Apache-2.0
"""What lies in a socket to be read: looked at without taking it out (SO_PEEK_OFF, socket(7)), and sent again."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Iterator

from stasis.errors import UnsupportedError

__all__ = ["packets", "peeking", "send"]

SO_PEEK_OFF = 42  # include/uapi/asm-generic/socket.h
SO_SNDBUFFORCE = 32
LARGEST_PACKET = 4 << 20
MOST_DESCRIPTORS = 253  # SCM_MAX_FD
LARGEST_BUFFER = (1 << 30) - 1

Packet = tuple[bytes, list[int]]
"""(bytes, descriptors of ours for what comes with them)"""


@contextlib.contextmanager
def peeking(sock: socket.socket) -> Iterator[None]:
    """Looks at what waits (MSG_PEEK) go from one to the next, from the first on; afterwards from where they did."""
    before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)


def packets(sock: socket.socket) -> Iterator[Packet]:
    """Everything that waits, in order. The descriptors are the caller's to close."""
    with peeking(sock):
        while True:
            try:
                packet = _peek(sock)
            except BlockingIOError:
                return
            if not packet[0]:
                return  # the end; an empty packet cannot be stepped over
            yield packet


def _peek(sock: socket.socket) -> Packet:
    room = socket.CMSG_SPACE(4 * MOST_DESCRIPTORS) + socket.CMSG_SPACE(64)
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, result, _ = sock.recvmsg(LARGEST_PACKET, room, flags)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    if result & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise UnsupportedError(f"a message of more than {LARGEST_PACKET} bytes waits in a socket")
    return data, list(fds)


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send what waited once more, whatever buffer the socket has."""
    sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, LARGEST_BUFFER)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    while data:
        done = sock.sendmsg([data], rights, socket.MSG_DONTWAIT)
        data, rights = data[done:], []
