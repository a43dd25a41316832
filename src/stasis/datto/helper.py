# SPDX-License-Identifier: Apache-2.0
"""A run of the helper process that works on the file system of a served device, from the worker's side."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from errno import EIO
from types import TracebackType
from typing import Any

from stasis.errors import StasisError

__all__ = ["Session"]

END_POLL = 0.2


class Session:
    """Requests and answers, one line of JSON each. Used beside the loop; `kill` may come from anywhere."""

    def __init__(self, module: str) -> None:
        self._killed = os.eventfd(0, os.EFD_CLOEXEC)
        self.is_killed = False
        self.process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._rest = b""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.end()

    def ask(self, **fields: Any) -> dict[str, Any]:
        """The answer to a request. Raises the StasisError that it is, or another if the helper has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(fields).encode() + b"\n")
            self.process.stdin.flush()
        line = self._line()
        if not line:
            raise StasisError("the process that works on the file system of the COW file has ended", errno=EIO,
                              hint="the log of the device tells why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise StasisError.from_dict(answer["error"])
        return answer

    def _line(self) -> bytes:
        """The next line, or nothing if there is none any more."""
        assert self.process.stdout is not None
        source = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self._killed, select.POLLIN)
        while b"\n" not in self._rest:
            if self._killed in [fd for fd, _ in poll.poll()]:
                return b""
            part = os.read(source, 1 << 16)
            if not part:
                return b""
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def end(self) -> None:
        """Have the helper end, undoing what it was not told to keep, and wait for that. Safe to call twice."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        while self.process.poll() is None and not self.is_killed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_POLL)
        self.process.stdout.close()
        if self._killed >= 0:
            os.close(self._killed)
            self._killed = -1

    def kill(self) -> None:
        """End it whatever it does. It may go on to wait for a device that is not served; nobody waits for it."""
        self.is_killed = True
        self.process.kill()
        if self._killed >= 0:
            os.eventfd_write(self._killed, 1)
