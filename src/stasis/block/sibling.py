# SPDX-License-Identifier: Apache-2.0
"""A second process that serves every other client of an image, so that a copy can use two processors.

Readers of an image need no lock, so they need not share a process. The first process accepts and hands clients over
through a socket; when it ends, however it does, the socket closes and the second one ends too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from select import EPOLLIN

from stasis.linux.eventloop import EventLoop
from stasis.nbd.server import Server

__all__ = ["Sibling", "fork_sibling", "serve_handed_over"]


class Sibling:
    """The second process, as the first one sees it."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._socket, self._pid = sock, pid
        self._next = False

    def take(self, client: socket.socket, server: int) -> bool:
        """Hand over every other client, for the server of this number. False if it is ours to serve."""
        self._next = not self._next
        if self._next:
            return False
        try:
            socket.send_fds(self._socket, [bytes((server,))], [client.fileno()])
        except OSError:
            return False  # it died, or has no time: what it does not take is served here
        client.close()
        return True


    def close(self) -> None:
        """Have it end, and wait for that: it has the origin open, which may be wanted by another as soon as we end."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def fork_sibling() -> tuple[Sibling | None, socket.socket | None]:
    """Fork, before there are threads, rings or loops: (sibling, None) in the first process, (None, socket) in the
    second, (None, None) where there is only one processor.

    Measured with nbdcopy, whole image of 1 GiB to null: see docs/design/performance.md.
    """
    if len(os.sched_getaffinity(0)) < 2:
        return None, None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        return None, theirs
    theirs.close()
    ours.setblocking(False)
    return Sibling(ours, pid), None


def serve_handed_over(loop: EventLoop, sock: socket.socket, servers: Sequence[Server]) -> None:
    """In the second process: serve what comes through the socket; its end stops the loop."""

    def receive(_events: int) -> None:
        message, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        if not message:
            loop.stop()
        for descriptor in descriptors:
            servers[message[0]].add_connection(socket.socket(fileno=descriptor))

    loop.register(sock.fileno(), EPOLLIN, receive)
