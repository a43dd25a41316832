# SPDX-License-Identifier: Apache-2.0
"""Processes that help a dumper. Where that is a worker in a pid namespace of others, they are its siblings: what it
leaves behind when it dies would else be a child of the namespace's first process, who knows nothing of it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from typing import NoReturn

from stasis.errors import StasisError, StateError
from stasis.linux.clone3 import CLONE_PARENT, fork_with

__all__ = ["apart", "fork_helper", "helpers", "wait_for_helper", "work_inside"]

DONE, FAILED = b"d", b"f"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP)

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


def apart(what: str, work: Callable[[], bytes]) -> bytes:
    """What `work` gives. A process of its own does it, which goes on to the end when the caller is killed: for what
    must not be left half done. StateError that says `what` it is and why, where it fails with OSError or StasisError.
    """
    reader, writer = os.pipe()
    pid = fork_helper()
    if pid == 0:
        os.close(reader)
        _do(work, writer)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    wait_for_helper(pid)
    if not told.startswith(DONE):
        reason = told.removeprefix(FAILED).decode(errors="replace") or "the process that looked at it has ended"
        raise StateError(f"{what}: {reason}")
    return told.removeprefix(DONE)


def _do(work: Callable[[], bytes], writer: int) -> NoReturn:
    """The life of that process."""
    status = 1
    try:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        os.setsid()  # a signal to the caller's group or terminal is not for us
        with open(writer, "wb") as file:
            try:
                file.write(DONE + work())
            except (OSError, StasisError) as error:
                file.write(FAILED + str(error).encode())
        status = 0
    finally:
        os._exit(status)
