# SPDX-License-Identifier: Apache-2.0
"""What the tests of the daemon do to processes and over NBD."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from stasis.nbd.client import Client as NbdClient

MIB = 1 << 20


def kill(pid: int) -> None:
    """End a process as a crash would, and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    with open(pidfd, "rb", buffering=0):
        assert select.select([pidfd], [], [], 30)[0]  # /proc shows a zombie while other threads still end


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def await_true(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that happens soon; the limit is only there so that a broken test ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def read(uri: str, offset: int, length: int) -> bytes:
    """Read over NBD, whatever the smallest block that the export takes."""
    with NbdClient.connect(uri, timeout=30) as export:
        start, end = _aligned(export, offset, length)
        return export.pread(start, end - start)[offset - start : offset - start + length]


def write(uri: str, offset: int, data: bytes) -> None:
    """Write over NBD, durably; the rest of the blocks that it touches stays as it is."""
    with NbdClient.connect(uri, timeout=30) as export:
        start, end = _aligned(export, offset, len(data))
        block = bytearray(export.pread(start, end - start))
        block[offset - start : offset - start + len(data)] = data
        export.pwrite(start, bytes(block))
        export.flush()


def _aligned(export: NbdClient, offset: int, length: int) -> tuple[int, int]:
    block = export.minimum_block
    return offset // block * block, min(-(-(offset + length) // block) * block, export.size)
