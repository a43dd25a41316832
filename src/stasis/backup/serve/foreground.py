# SPDX-License-Identifier: Apache-2.0
"""Serving exports in the process at hand until a signal ends it."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stasis.backup.serve.opening import ServedBackups
from stasis.linux.eventloop import EventLoop
from stasis.nbd.server import Server

if TYPE_CHECKING:
    from stasis.nbd.tls import TlsConfig

__all__ = ["Listener", "serve"]

LEASE_SECONDS = 300.0


@dataclass(frozen=True)
class Listener:
    """A listening socket, and what its clients must prove."""

    socket: socket.socket
    tls: TlsConfig | None = None


def serve(
    backups: ServedBackups, listeners: Sequence[Listener], ready: Callable[[EventLoop], None], *, signals: bool = True
) -> None:
    """Serve until the loop is stopped, which SIGTERM and SIGINT do, unless `signals` is false.

    `ready` is called once clients are taken; it may add to the loop. A second signal ends the process at once, even
    if the store does not answer.
    """
    with EventLoop() as loop, contextlib.ExitStack() as stack:
        for listener in listeners:
            server = Server(loop, backups, listener.tls)
            stack.callback(server.close)
            server.add_listener(listener.socket)
        loop.every(LEASE_SECONDS, backups.keep_lease)
        if signals:
            stack.enter_context(_signals(lambda: _stop(loop, backups)))
        ready(loop)
        loop.run()


def _stop(loop: EventLoop, backups: ServedBackups) -> None:
    backups.abort()
    loop.stop()


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    def arrived(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop()

    before = {number: signal.signal(number, arrived) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
