# SPDX-License-Identifier: Apache-2.0
"""Processes that help a dumper. Where that is a worker in a pid namespace of others, they are its siblings: what it
leaves behind when it dies would else be a child of the namespace's first process, who knows nothing of it."""

from __future__ import annotations

import os
import select

from stasis.linux.clone3 import CLONE_PARENT, fork_with

__all__ = ["fork_helper", "helpers", "wait_for_helper", "work_inside"]

_state: dict[str, bool] = {"inside": False}
_helpers: set[int] = set()


def work_inside() -> None:
    """In a worker: helpers are children of our parent from here on, who waits for them in the end."""
    _state["inside"] = True


def fork_helper() -> int:
    """As os.fork."""
    if not _state["inside"]:
        return os.fork()
    pid = fork_with("clone3 of a helper", flags=CLONE_PARENT)
    if pid:
        _helpers.add(pid)
    return pid


def helpers() -> set[int]:
    """Those that are no children of ours."""
    return set(_helpers)


def wait_for_helper(pid: int) -> None:
    """Until it has ended."""
    if pid not in _helpers:
        os.waitpid(pid, 0)
        return
    _helpers.discard(pid)
    pidfd = os.pidfd_open(pid)  # it stays as a zombie up to the end of the worker
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
    finally:
        os.close(pidfd)
