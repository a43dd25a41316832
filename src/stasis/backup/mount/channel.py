# SPDX-License-Identifier: Apache-2.0
"""Messages between the processes of a mount: JSON objects on a pair of sockets. Its end tells of a process's end."""

from __future__ import annotations

import json
import socket
from typing import Any

__all__ = ["Channel", "channels"]

_LONGEST = 64 << 10


class Channel:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> bool:
        """Send a message; False if the other process is gone."""
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """Wait for a message; None once the other process is gone."""
        try:
            data = self._socket.recv(_LONGEST)
        except OSError:
            return None
        message: dict[str, Any] | None = json.loads(data) if data else None
        return message

    def close(self) -> None:
        self._socket.close()


def channels() -> tuple[Channel, Channel]:
    """A pair; every message arrives whole."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)
