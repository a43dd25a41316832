# SPDX-License-Identifier: Apache-2.0
"""The process that works on the file system of a served device for its worker: `python -m stasis.daemon.cowhelper`.

One request per process: JSON lines on standard input, answers on standard output. Why it is a process of its own is
told in stasis.datto.placing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from stasis.datto import placing
from stasis.errors import StateError
from stasis.live.stack import Stack

__all__ = ["main"]


class _Pipes:
    def send(self, **fields: Any) -> None:
        try:
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise EOFError from error

    def receive(self) -> Mapping[str, Any]:
        line = sys.stdin.readline()
        if not line.endswith("\n"):
            raise EOFError
        received: dict[str, Any] = json.loads(line)
        return received


def _is_here(path: str, node: str) -> bool:
    """Whether a path lies directly on the node's file system. StateError (EINVAL) if it lies above it in another way:
    whoever writes there waits for the worker, and the worker would wait for it. BusyError if that cannot be seen."""
    try:
        mine = os.stat(os.path.dirname(os.path.realpath(path))).st_dev
        device = os.stat(node).st_rdev
    except OSError:
        return False  # what is wrong with it is said where files elsewhere are made
    if mine == device:
        return True
    with Stack([device]) as above:
        if above.holds(os.path.dirname(os.path.realpath(path))) is not None:
            raise StateError(f"{path} lies on the device that it is to protect, but not directly", errno=errno.EINVAL,
                             hint="put it on an ext4 or xfs on the device itself, or on another disk")
    return False


def main() -> int:
    """Serve one request. The end of the worker ends it too: what it has begun is undone."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    pipes = _Pipes()
    with contextlib.suppress(EOFError):
        placing.serve(pipes, pipes.receive(), _is_here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
