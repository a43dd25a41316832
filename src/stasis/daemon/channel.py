# SPDX-License-Identifier: Apache-2.0
"""The daemon's end of a worker's control socket: one JSON object per SOCK_SEQPACKET message.

The protocol is the table "worker control protocol" in docs/design/architecture.md. A connection either carries
commands, each answered, or, after `subscribe`, events. Whoever holds a worker must do so over a connection of its own:
its end is what lets the worker go, so that no death of a daemon leaves a device held.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stasis.errors import BusyError, DaemonError, NotFoundError, StasisError, StorageError, UsageError

__all__ = ["Channel", "WorkerGone"]

MESSAGE_SIZE = 1 << 17
"""Largest message; SEQPACKET messages must fit the socket buffer (net.core.wmem_default is 208 KiB)."""
DESCRIPTORS = 8


class WorkerGone(DaemonError):
    """The worker closed the connection or did not answer in time."""


class Channel:
    """One connection to a worker; used by one thread at a time."""

    def __init__(self, sock: socket.socket, label: str, path: Path | None = None) -> None:
        self._socket = sock
        self._path = path
        self._out_of_step = False
        self.label = label

    @classmethod
    def connect(cls, path: Path, label: str, timeout: float = 10.0) -> Channel:
        """Connect to the control socket. OSError if nobody listens; `timeout` in seconds holds for every call."""
        return cls(_connected(path, timeout), label, path)

    def _step_again(self) -> None:
        """After an answer that did not come in time it would come later, in the place of another: connect anew."""
        if self._out_of_step and self._path is not None:
            fresh = _connected(self._path, self._socket.gettimeout())
            self._socket.close()
            self._socket, self._out_of_step = fresh, False

    def send(self, op: str, descriptors: Sequence[int] = (), **arguments: Any) -> None:
        """Send a request without waiting for its answer. Raises WorkerGone."""
        message = json.dumps({"op": op, **arguments}, separators=(",", ":")).encode()
        try:
            self._step_again()
            socket.send_fds(self._socket, [message], descriptors)
        except OSError as error:
            raise self._gone(op, error) from error

    def receive(self, op: str) -> tuple[dict[str, Any], list[int]]:
        """The answer to `op` and the descriptors that came with it. Raises WorkerGone, or the worker's error."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE_SIZE, DESCRIPTORS)
        except OSError as error:
            raise self._gone(op, error) from error
        for fd in descriptors:
            os.set_inheritable(fd, False)  # recv_fds ignores MSG_CMSG_CLOEXEC (Python 3.11)
        if not data:
            raise self._gone(op, None)
        answer = json.loads(data)
        if answer.get("ok"):
            return answer, descriptors
        for fd in descriptors:
            os.close(fd)
        raise _failure(answer, self.label)

    def call(self, op: str, descriptors: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """Send a request and return its answer; descriptors that come with it are closed."""
        self.send(op, descriptors, **arguments)
        answer, received = self.receive(op)
        for fd in received:
            os.close(fd)
        return answer

    def descriptors(self) -> dict[str, int]:
        """The worker's open files by name: origin, listen, and where it has them buffered and storage."""
        self.send("descriptors")
        answer, received = self.receive("descriptors")
        return dict(zip(answer["descriptors"], received, strict=True))

    def subscribe(self) -> None:
        """From now on this connection carries events, and only these."""
        self.call("subscribe")
        self._socket.settimeout(None)

    def next_event(self) -> dict[str, Any] | None:
        """Wait for the next event; None when the worker is gone or `shutdown` was called."""
        try:
            data = self._socket.recv(MESSAGE_SIZE)
        except OSError:
            return None
        return dict(json.loads(data)) if data else None

    def shutdown(self) -> None:
        """Wake a thread that waits in `next_event`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _gone(self, op: str, error: OSError | None) -> WorkerGone:
        if isinstance(error, TimeoutError):
            self._out_of_step = True
            return WorkerGone(f"the worker of {self.label} did not answer {op} in time", errno=errno.ETIMEDOUT)
        return WorkerGone(f"the worker of {self.label} is gone", hint="it is restarted; try again",
                          errno=errno.ECONNRESET)


def _connected(path: Path, timeout: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


_KINDS: dict[int, type[StasisError]] = {
    errno.EBUSY: BusyError,
    errno.EALREADY: BusyError,
    errno.ENOENT: NotFoundError,
    errno.EINVAL: UsageError,
    errno.ENOSPC: StorageError,
}


def _failure(answer: dict[str, Any], label: str) -> StasisError:
    """The worker's refusal as an error; its errno tells which kind of failure it is."""
    number = int(answer.get("errno", 0))
    text = str(answer.get("message") or os.strerror(number))
    return _KINDS.get(number, StasisError)(f"the worker of {label} refuses: {text}", errno=number)
