# SPDX-License-Identifier: Apache-2.0
"""An NBD server as a process of its own: for clients that hold the interpreter's lock, and for socket activation.

python -m tests.nbd.serve [SOCKET]
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stasis.linux.activation import listen_fds
from stasis.linux.eventloop import EventLoop
from stasis.nbd.export import ExportList
from stasis.nbd.listeners import unix_listener
from stasis.nbd.server import Server
from tests.nbd.exports import MemoryExport

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.nbd.serve"]
SIZE = 8 << 20


def environment() -> dict[str, str]:
    """An environment in which `python -m tests.nbd.serve` works from anywhere."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The address of a served MemoryExport named "disk" with a hole and a dirty block."""
    process = subprocess.Popen([*COMMAND, str(path)], env=environment())
    try:
        deadline = time.monotonic() + 30
        while not _listening(path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"nbd+unix:///disk?socket={path}"
    finally:
        process.terminate()
        process.wait()


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def main() -> None:
    export = MemoryExport(SIZE)
    export.data[: 1 << 20] = b"a" * (1 << 20)
    export.holes[:256] = bytes(256)
    export.dirty[16:32] = b"\x01" * 16
    passed = [socket.socket(fileno=fd) for fd, _ in listen_fds()]
    with EventLoop() as loop:
        server = Server(loop, ExportList(export))
        for listener in passed or [unix_listener(sys.argv[1])]:
            server.add_listener(listener)
        signal.signal(signal.SIGTERM, lambda number, frame: loop.stop())
        loop.run()
        server.close()


if __name__ == "__main__":
    main()
