# SPDX-License-Identifier: Apache-2.0
"""The kinds of open files that are kept."""

from __future__ import annotations

from stasis.process.files.epoll import Epolls
from stasis.process.files.eventfd import Eventfds
from stasis.process.files.fifo import Fifos
from stasis.process.files.inet import InetSockets
from stasis.process.files.inotify import Inotifies
from stasis.process.files.kind import FileKind
from stasis.process.files.memfd import Memfds
from stasis.process.files.options import FileOptions
from stasis.process.files.pidfd import Pidfds
from stasis.process.files.pipes import Pipes
from stasis.process.files.regular import RegularFiles
from stasis.process.files.signalfd import Signalfds
from stasis.process.files.terminals import Terminals
from stasis.process.files.timerfd import Timerfds
from stasis.process.files.unix import UnixSockets

__all__ = ["all_kinds"]

# Sockets first: what is found on its way through them is dumped before the other kinds finish.
KINDS: tuple[type[FileKind], ...] = (
    UnixSockets, InetSockets, RegularFiles, Memfds, Pipes, Fifos, Eventfds, Timerfds, Signalfds, Epolls,
    Inotifies, Pidfds, Terminals,
)  # fmt: skip


def all_kinds(options: FileOptions) -> list[FileKind]:
    """New instances, for one check, one dump or one restore."""
    return [kind(options) for kind in KINDS]
