# SPDX-License-Identifier: Apache-2.0
"""A process that holds what watches a tree's memory from one dump to the next.

When the last descriptor of a watch is closed the kernel forgets which pages were written. Between two commands a
keeper has them; it is found by the pid and start time of the tree's first process, gives everything to whoever comes
next, and ends, as it does when that process ends. A command that dies takes the descriptors with it: then nothing is
known about the memory, and it is dumped whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
from typing import Any, NoReturn

from stasis.errors import BusyError
from stasis.linux import process
from stasis.process.dump.canary import Canary
from stasis.process.dump.tracking import Key, Tracking

__all__ = ["brought", "give", "hand_over", "take", "work_inside"]

PATIENCE = 5.0
PORTION = 128  # descriptors in a message; SCM_MAX_FD is 253
LARGEST = 1 << 16
UCRED = struct.Struct("<3i")


_outside: dict[str, Any] = {}


def work_inside(taken: Tracking, connection: socket.socket) -> None:
    """In a worker that lives in other namespaces, where it would not find a keeper, nor could one live on: what is
    `taken` was fetched by the command, and gets what is given through the connection."""
    _outside.update(taken=taken, connection=connection)


def hand_over() -> None:
    """In a worker: nothing is given any more."""
    if _outside:
        _outside["connection"].close()


def brought(connection: socket.socket) -> Tracking:
    """In the command: what a worker gives; to be called while it works. `since` is empty where it gave nothing."""
    tracking = Tracking()
    _receive(connection, tracking)
    return tracking


def _address(root: Key) -> str:
    """An abstract socket: it leaves no file behind, and goes with its keeper."""
    return f"\0stasis-keeper-{os.geteuid()}-{root[0]}-{root[1]}"


def take(root: Key) -> Tracking:
    """What a keeper holds for the tree; it ends. Nothing where there is none."""
    if _outside:
        return _outside.pop("taken", None) or Tracking()
    tracking = Tracking()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(PATIENCE)
        try:
            connection.connect(_address(root))
            if _peer_user(connection) == os.geteuid():
                _receive(connection, tracking)
        except (ConnectionError, TimeoutError):
            tracking.close()
            tracking.since = ""
    return tracking


def _receive(connection: socket.socket, tracking: Tracking) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(connection, LARGEST, PORTION, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        told = json.loads(data)
        for ((pid, start), canary), fd in zip(told["tasks"], fds, strict=True):
            tracking.watches[pid, start] = fd
            if canary is not None:
                tracking.canaries[pid, start] = Canary(*canary)
        tracking.since = told["since"]  # with the last message: before it there is something missing


def give(root: Key, tracking: Tracking) -> None:
    """Start a keeper with all that is watched; ours is closed."""
    if _outside:
        with contextlib.closing(tracking):
            _send(_outside["connection"], tracking)
        return
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener, contextlib.closing(tracking):
        try:
            listener.bind(_address(root))
        except OSError as error:
            raise BusyError(f"the memory of process {root[0]} is watched by another pre-dump meanwhile",
                            hint="wait for the other command") from error  # fmt: skip
        listener.listen()
        try:
            pidfd = process.pidfd_open(root[0])
        except ProcessLookupError:
            return  # nothing is left to watch
        try:
            child = os.fork()
            if child == 0:
                _start(root, listener, pidfd, tracking)
            os.waitpid(child, 0)
        finally:
            os.close(pidfd)


def _start(root: Key, listener: socket.socket, pidfd: int, tracking: Tracking) -> NoReturn:
    """The keeper's life. It is nobody's child, in a session of its own, and has nothing open that is not its."""
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.chdir("/")
        _close_all_but({listener.fileno(), pidfd, *tracking.watches.values()})
        if process.start_time(root[0]) == root[1]:
            _serve(listener, pidfd, tracking)
        status = 0
    finally:
        os._exit(status)


def _close_all_but(kept: set[int]) -> None:
    last = 2
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    for fd in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(last + 1, fd)
        last = fd


def _serve(listener: socket.socket, pidfd: int, tracking: Tracking) -> None:
    """Wait for who takes over, or for the end of the process."""
    while True:
        ready, _, _ = select.select([listener.fileno(), pidfd], [], [])
        if pidfd in ready:
            return
        connection, _ = listener.accept()
        with connection:
            if _peer_user(connection) == os.geteuid():
                listener.close()  # who has all of it may start another keeper before we are gone
                _send(connection, tracking)
                return


def _send(connection: socket.socket, tracking: Tracking) -> None:
    entries = list(tracking.watches.items())
    for at in range(0, max(len(entries), 1), PORTION):
        portion = entries[at : at + PORTION]
        last = at + PORTION >= len(entries)
        tasks = [(key, tracking.canaries.get(key)) for key, _ in portion]
        message = {"since": tracking.since if last else "", "tasks": tasks}
        socket.send_fds(connection, [json.dumps(message).encode()], [fd for _, fd in portion])


def _peer_user(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    return int(UCRED.unpack(raw)[1])
