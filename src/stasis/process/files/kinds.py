# SPDX-License-Identifier: Apache-2.0
"""The kinds of open files that are kept. A restore imports only those that its images have: the others' modules would
cost it a third of the time in which a small process is back."""

from __future__ import annotations

import importlib
from collections.abc import Container
from typing import TYPE_CHECKING

from stasis.process.images.schema.files import FdTypes

if TYPE_CHECKING:
    from stasis.process.files.kind import FileKind
    from stasis.process.files.options import FileOptions

__all__ = ["all_kinds"]

# Sockets first: what is found on its way through them is dumped before the other kinds finish.
KINDS = {
    FdTypes.UNIXSK: ("unix", "UnixSockets"),
    FdTypes.INETSK: ("inet", "InetSockets"),
    FdTypes.NETLINKSK: ("netlink", "NetlinkSockets"),
    FdTypes.PACKETSK: ("packet", "PacketSockets"),
    FdTypes.NS: ("nsfile", "NamespaceFiles"),
    FdTypes.EXT: ("mqueues", "MessageQueues"),
    FdTypes.REG: ("regular", "RegularFiles"),
    FdTypes.MEMFD: ("memfd", "Memfds"),
    FdTypes.PIPE: ("pipes", "Pipes"),
    FdTypes.FIFO: ("fifo", "Fifos"),
    FdTypes.EVENTFD: ("eventfd", "Eventfds"),
    FdTypes.TIMERFD: ("timerfd", "Timerfds"),
    FdTypes.SIGNALFD: ("signalfd", "Signalfds"),
    FdTypes.EVENTPOLL: ("epoll", "Epolls"),
    FdTypes.INOTIFY: ("inotify", "Inotifies"),
    FdTypes.FANOTIFY: ("fanotify", "Fanotifies"),
    FdTypes.PIDFD: ("pidfd", "Pidfds"),
    FdTypes.TTY: ("terminals", "Terminals"),
}
"""Module and class of each."""


def all_kinds(options: FileOptions, types: Container[FdTypes] = frozenset(KINDS)) -> list[FileKind]:
    """New instances for one check, one dump or one restore, the latter with the types that its images have."""
    return [_kind(*KINDS[type_], options) for type_ in KINDS if type_ in types]


def _kind(module: str, name: str, options: FileOptions) -> FileKind:
    found: FileKind = getattr(importlib.import_module(f"stasis.process.files.{module}"), name)(options)
    return found
