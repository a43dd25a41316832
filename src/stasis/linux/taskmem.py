# SPDX-License-Identifier: Apache-2.0
"""The memory of another task: /proc/PID/mem, which a tracer may read and write whatever the protection."""

import errno
import os

from stasis.linux import libc

__all__ = ["TaskMemory"]


class TaskMemory:
    """An open /proc/PID/mem. Addresses and lengths in bytes."""

    def __init__(self, pid: int) -> None:
        """PermissionError unless this process may trace `pid`."""
        self.pid = pid
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def read(self, address: int, length: int) -> bytes:
        """EFAULT where nothing is mapped."""
        found = os.pread(self._fd, length, address)
        while len(found) < length:
            more = os.pread(self._fd, length - len(found), address + len(found))
            if not more:
                raise libc.error(errno.EFAULT, f"read of process {self.pid} at {address + len(found):#x}")
            found += more
        return found

    def write(self, address: int, data: bytes) -> None:
        """Also into pages that are read-only for the task: a private copy is made of them."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], address + done)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
