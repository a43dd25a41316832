# SPDX-License-Identifier: Apache-2.0
"""Descriptors of processes, and through them descriptors that processes have open."""

import os
from types import TracebackType
from typing import Self

from stasis.linux import libc, process

__all__ = ["Pidfd"]

SYS_PIDFD_GETFD = 438  # since Linux 5.6


class Pidfd:
    """A process by descriptor; a context manager."""

    def __init__(self, pid: int) -> None:
        """ESRCH if there is no such process."""
        self.pid = pid
        self.fd = process.pidfd_open(pid)

    def get(self, fd: int) -> int:
        """A descriptor of ours for the open file description behind `fd` of the process. EPERM unless we may trace it.

        Everything that belongs to the description is shared with it: position, flags, owner.
        """
        return libc.check(libc.syscall(SYS_PIDFD_GETFD, self.fd, fd, 0, 0, 0, 0), "pidfd_getfd", f"{self.pid}:{fd}")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
