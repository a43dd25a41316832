# SPDX-License-Identifier: Apache-2.0
"""A worker that is held: between two batches it serves nothing but the one who holds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from errno import EINVAL, EIO
from typing import Any

from stasis.block.control import Connection

Action = Callable[[], dict[str, Any]]

ENDING = ("release", "abort")


class Hold:
    """Serves `switch`, `release` and `abort` on one connection; everything else in this process waits."""

    def __init__(self, connection: Connection, actions: Mapping[str, Action]) -> None:
        self._connection, self._actions = connection, actions
        self._began = time.monotonic_ns()

    def serve(self, seconds: float) -> bool:
        """Until released or aborted. False if that did not come in time, or its sender is gone."""
        deadline = time.monotonic() + seconds
        sock = self._connection.sock
        try:
            while (left := deadline - time.monotonic()) > 0:
                sock.settimeout(left)
                request = self._connection.receive()
                if request is None:
                    return False
                if self._answer(str(request[0].get("op"))):
                    return True
            return False
        except OSError:
            return False
        finally:
            sock.settimeout(None)

    def _answer(self, operation: str) -> bool:
        action = self._actions.get(operation)
        if action is None:
            self._connection.refuse(EINVAL, f"{operation!r} is not possible while held")
            return False
        try:
            result = action()
        except OSError as error:
            self._connection.refuse(error.errno or EIO, error.strerror or str(error))
            return False
        self._connection.reply(held_ns=time.monotonic_ns() - self._began, **result)
        return operation in ENDING
