# SPDX-License-Identifier: Apache-2.0
"""The process that freezes file systems and thaws them again, whatever becomes of the one that copies.

It is a process of its own, so that no fate of the copier (killed, stopped, slow, swapped out) keeps file systems
frozen. All of its memory is locked before the first freeze, since a page that had to be read from or swapped to a
frozen disk might never come. It writes to no file. Started by `stasis.live.freezer` with two arguments: the
descriptor of a SOCK_SEQPACKET socket, and those of the file systems in the order of freezing, with commas.

Messages are JSON, one per packet:

    to us       {"do": "freeze", "seconds": S, "attempt": A}   freeze all; thaw at the latest S seconds from now
                {"do": "thaw"}                     thaw all
                {"do": "restore", "text": T}       with a descriptor: write T to it at the end (throttled cgroups)
                {"do": "release"}                  write what `restore` left with us now; sent right behind "freeze"
    from us     {"ready": true}
                {"frozen": [N...], "unable": [N...], "failed": N or null, "errno": E, "attempt": A}
                {"thawed": true, "expired": B, "others": [N...], "stuck": [N...]}

N is the place of a file system in the order. `expired`: the deadline came first. `others`: somebody else thawed it.
The end of the connection, which the copier's death is, thaws and restores everything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time

from stasis.linux import freeze, memlock

TYPE_CHECKING = False  # a copy waits for this to come up, so that it loads no more than it needs
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["Watchdog", "main"]

MOST_BYTES = 1 << 16
PRIORITY = 1
OOM_NEVER = b"-1000"  # Documentation/filesystems/proc.rst, /proc/PID/oom_score_adj
CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)


class Watchdog:
    """Freezes in a thread of its own, so that the main thread can thaw what is frozen while the next one hangs.

    `_lock` guards `_frozen` and `_attempt`, the attempt that may still freeze. A freeze that ends after its attempt is
    over is undone by the freezing thread itself, so that each frozen file system has exactly one who thaws it.
    """

    def __init__(self, control: socket.socket, descriptors: Sequence[int]) -> None:
        self._control, self._descriptors = control, list(descriptors)
        self._lock = threading.Lock()
        self._frozen: list[int] = []
        self._attempt: int | None = None
        self._freezes_now: tuple[int, int] | None = None
        self._expired = False
        self._deadline: float | None = None
        self._restores: list[tuple[int, bytes]] = []
        self._orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._freezing = threading.Thread(target=self._freeze_when_told, daemon=True)

    def serve(self) -> None:
        """Work until the copier says no more. Everything is thawed and restored then."""
        self._freezing.start()
        self._send({"ready": True})
        try:
            while (message := self._next()) is not None:
                if message:
                    self._obey(message)
                else:
                    self._expire()
        finally:
            self._expire()
            self._restore()
            self._orders.put(None)
            self._freezing.join()

    def _next(self) -> dict[str, Any] | None:
        """The next message; {} when the deadline is reached, None when the copier is gone."""
        wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(None if wait is None else wait * 1000):
            return {}
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MOST_BYTES, 1)
        except OSError:
            return None
        if not data:
            return None
        message: dict[str, Any] = json.loads(data)
        if descriptors:
            message["descriptor"] = descriptors[0]
        return message

    def _obey(self, message: dict[str, Any]) -> None:
        if message["do"] == "freeze":
            self._attempt, self._expired = message["attempt"], False
            self._deadline = time.monotonic() + message["seconds"]
            self._orders.put(self._attempt)
        elif message["do"] == "thaw":
            expired = self._expired
            others, stuck = self._thaw_all()
            self._deadline = None
            self._send({"thawed": True, "expired": expired, "others": others, "stuck": stuck})
        elif message["do"] == "restore":
            self._restores.append((message["descriptor"], message["text"].encode()))
        elif message["do"] == "release":
            self._restore()

    def _expire(self) -> None:
        self._deadline = None
        self._expired = True
        self._thaw_all()
        if (hanging := self._freezes_now) is not None:
            self._tell(hanging[0], [], hanging[1], errno.ETIMEDOUT)

    def _thaw_all(self) -> tuple[list[int], list[int]]:
        """Thaw in the reverse order; (those that were not frozen any more, those that could not be thawed)."""
        others, stuck = [], []
        with self._lock:
            self._attempt = None
            for number in reversed(self._frozen):
                try:
                    if not freeze.thaw(self._descriptors[number]):
                        others.append(number)
                except OSError:
                    stuck.append(number)
            self._frozen = []
        return others, stuck

    def _restore(self) -> None:
        for descriptor, text in self._restores:
            with contextlib.suppress(OSError):  # the cgroup went, and its limits with it
                os.write(descriptor, text)
            os.close(descriptor)
        self._restores = []

    # -- the thread that freezes --------------------------------------------------------------------------------------

    def _freeze_when_told(self) -> None:
        while (attempt := self._orders.get()) is not None:
            unable: list[int] = []
            failed, code = self._freeze_all(attempt, unable)
            self._freezes_now = None
            self._tell(attempt, unable, failed, code)

    def _tell(self, attempt: int, unable: list[int], failed: int | None, code: int) -> None:
        self._send({"frozen": list(self._frozen), "unable": unable, "failed": failed, "errno": code,
                    "attempt": attempt})

    def _freeze_all(self, attempt: int, unable: list[int]) -> tuple[int | None, int]:
        """Freeze one after the other; (the one that failed, its errno). None failed: (None, 0)."""
        for number, descriptor in enumerate(self._descriptors):
            self._freezes_now = attempt, number
            if self._attempt != attempt:
                return number, errno.ETIMEDOUT
            try:
                freeze.freeze(descriptor)
            except OSError as error:
                if error.errno in CANNOT:
                    unable.append(number)
                    continue
                return number, error.errno or errno.EIO
            if not self._enter(attempt, number):
                return number, errno.ETIMEDOUT
        return None, 0

    def _enter(self, attempt: int, number: int) -> bool:
        """Note that it is frozen. Too late: thaw it again."""
        with self._lock:
            if self._attempt == attempt:
                self._frozen.append(number)
                return True
            with contextlib.suppress(OSError):  # whoever unmounted or thawed it has done our work
                freeze.thaw(self._descriptors[number])
            return False

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the copier may be gone, or stopped with a full socket
            self._control.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def prepare() -> None:
    """Lock all memory, and be neither killed for memory nor kept from the processor, as far as we may."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(OOM_NEVER)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    _rehearse()
    memlock.lock_all()


def _rehearse() -> None:
    """Call once what will be called, on a pipe, so that nothing is looked up or imported for the first time later."""
    ends = os.pipe()
    for call in (freeze.freeze, freeze.thaw):
        with contextlib.suppress(OSError):
            call(ends[0])
    for end in ends:
        os.close(end)


def main() -> None:
    """Serve the socket that was given."""
    control = socket.socket(fileno=int(sys.argv[1]))
    descriptors = [int(number) for number in sys.argv[2].split(",") if number]
    prepare()
    with control:
        Watchdog(control, descriptors).serve()


if __name__ == "__main__":
    main()
