# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with tasks, with the pid in the sentence."""

from __future__ import annotations

from stasis.errors import NotFoundError, PermissionDeniedError, StasisError

__all__ = ["refusal"]


def refusal(pid: int, error: OSError) -> StasisError:
    """The error for a task that could not be traced."""
    if isinstance(error, ProcessLookupError):
        return NotFoundError(f"there is no process {pid}", hint="give the pid of a running process")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(
            f"process {pid} may not be traced: it belongs to another user, is traced already, or the system forbids it",
            hint="run as root, end the debugger, or look at /proc/sys/kernel/yama/ptrace_scope",
        )
    return StasisError(f"process {pid} cannot be traced: {error.strerror or error}", errno=error.errno or 0)
