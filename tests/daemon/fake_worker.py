# SPDX-License-Identifier: Apache-2.0
"""A worker that does as it is told to: it answers, refuses, goes silent or dies at a chosen request."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any

from stasis.daemon.channel import Channel

ANSWERS: dict[str, dict[str, Any]] = {
    "switch": {"generation": "g", "change_number": 1, "wrapped": False},
    "release": {"held_ns": 5},
}


class FakeWorker:
    """The far end of a channel. `faults` maps a request to "refuse", "die" or "silent"."""

    def __init__(self, name: str, journal: list[tuple[str, str]], **faults: str) -> None:
        self.name = name
        self.requests: list[str] = []
        self._journal = journal
        self._faults = faults
        near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.settimeout(1.0 if "silent" in faults.values() else 30.0)
        self.channel = Channel(near, name)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.channel.close()
        self._thread.join(30)
        self._far.close()

    def _serve(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._far, 1 << 16, 4)
            for fd in fds:
                os.close(fd)
            if not data:
                return
            op = json.loads(data)["op"]
            self.requests.append(op)
            self._journal.append((self.name, op))
            fault = self._faults.get(op)
            if fault == "die":
                self._far.shutdown(socket.SHUT_RDWR)
                return
            if fault == "refuse":
                self._far.send(json.dumps({"ok": False, "errno": 28, "message": f"{op} is impossible"}).encode())
            elif fault != "silent":
                self._far.send(json.dumps({"ok": True, **ANSWERS.get(op, {})}).encode())
