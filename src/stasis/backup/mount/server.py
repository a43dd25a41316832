# SPDX-License-Identifier: Apache-2.0
"""The process that reads the repository and serves one backup to the kernel of this host."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from stasis.backup.mount.channel import Channel
from stasis.backup.mount.forking import leave_session
from stasis.backup.mount.record import Record
from stasis.backup.mount.takedown import take_apart_when_unused
from stasis.backup.repo import Repository
from stasis.backup.serve.foreground import Listener, serve
from stasis.backup.serve.opening import Wanted, open_backups
from stasis.errors import StasisError
from stasis.linux.eventloop import EPOLLIN, EventLoop
from stasis.nbd.listeners import unix_listener
from stasis.nbd.uri import NbdUri

__all__ = ["run"]


def run(guardian: Channel, record: Record, wanted: Wanted, open_repository: Callable[[], Repository]) -> None:
    """Serve until the guardian says that it is enough, or take over from it if it dies."""
    try:
        with open_repository() as repository, open_backups(repository, wanted) as backups:
            listener = Listener(unix_listener(str(record.socket)))
            backup = backups.served[0].backup
            leave_session(record.log)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the guardian gets them too, and knows what to do
            uri = str(NbdUri(backup.id, socket=str(record.socket)))

            def ready(loop: EventLoop) -> None:
                loop.register(guardian.fileno(), EPOLLIN, lambda _: _heard(loop, guardian, record))
                guardian.send(uri=uri, backup=backup.id, device=backup.device, time=backup.time, size=backup.size)

            serve(backups, [listener], ready, signals=False)
    except StasisError as error:
        guardian.send(error=error.as_dict())
    except OSError as error:
        guardian.send(error=StasisError(f"the repository cannot be read: {error}", errno=error.errno or 0).as_dict())


def _heard(loop: EventLoop, guardian: Channel, record: Record) -> None:
    """The guardian is done, or dead. What it leaves is taken apart by a thread, as its last reads must be served."""
    loop.unregister(guardian.fileno())
    if guardian.receive() is not None:
        loop.stop()
        return

    def take_over() -> None:
        try:
            left = record.reload()
            if left is not None:
                take_apart_when_unused(left)
        finally:
            loop.stop()

    threading.Thread(target=take_over).start()
