# SPDX-License-Identifier: Apache-2.0
"""The copier's side of a freeze: start the watchdog, let it freeze and thaw, and thaw ourselves if it died.

Either process alone thaws everything: the watchdog at its deadline or when our connection ends, we when the
watchdog's ends or when it has not answered a while after the deadline.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from stasis.errors import BusyError, StasisError
from stasis.linux import freeze
from stasis.live.stack import FileSystem

__all__ = ["FreezeExpired", "Freezer", "Frozen"]

PROGRAM = "from stasis.live.watchdog import main; main()"  # -m would load more
START_SECONDS = 30.0
GRACE_SECONDS = 2.0
RETRY = "run the command again; nothing is left frozen by it, and no change is lost"


class FreezeExpired(BusyError):
    """The time for the freeze was up before the copy was complete; all is thawed."""


@dataclass(frozen=True)
class Frozen:
    """What a freeze came to: the file systems that rest, and those that cannot be frozen. Seconds it took."""

    resting: tuple[FileSystem, ...]
    unable: tuple[FileSystem, ...]
    seconds: float


class Freezer:
    """One watchdog and the file systems it answers for, in the order of freezing; a context manager."""

    def __init__(self, file_systems: Sequence[FileSystem]) -> None:
        """Start the watchdog; it comes up while other things are done. Raises OSError.

        Without file systems it is started only when something is left with it.
        """
        self.file_systems = tuple(file_systems)
        self._attempt = 0
        self._limit = self._deadline = 0.0
        self._is_up = False
        self._may_hold = False  # from asking for a freeze to the news of the thaw
        self._process: subprocess.Popen[bytes] | None = None
        if file_systems:
            self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        descriptors = [file_system.fd for file_system in self.file_systems]
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-c", PROGRAM, str(theirs.fileno()), ",".join(map(str, descriptors))],
                pass_fds=[theirs.fileno(), *descriptors], start_new_session=True, cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            on_failure.pop_all()

    def await_start(self) -> None:
        """Return once the watchdog is ready. Raises StasisError if it does not come up."""
        if self._process is None:
            return
        if not self._is_up:
            self._is_up = self._receive(START_SECONDS) is not None
        if not self._is_up:
            raise StasisError("the watchdog of the freeze did not start", hint="look at the limits of locked memory "
                              "(ulimit -l) and whether root runs this")

    @property
    def pid(self) -> int:
        """The watchdog's process id; 0 if there is none."""
        return 0 if self._process is None else self._process.pid

    def __enter__(self) -> Freezer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the watchdog; whatever is frozen is thawed first."""
        if self._process is None:
            return
        self._control.close()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._thaw_here()  # what it was still freezing when it was stopped is frozen by now

    def freeze(self, seconds: float, *, release: bool = False) -> Frozen:
        """Freeze all. Thawed in any case `seconds` from now. Raises BusyError, FreezeExpired, StasisError.

        release: once it has begun, write what was left with `restore_later`. A freeze waits for the writes that are
        underway, and those of a cgroup that is held to little would take long.
        """
        self.await_start()
        self._limit, started = seconds, time.monotonic()
        self._deadline = started + seconds
        if not self.file_systems:
            return Frozen((), (), 0.0)
        self._attempt += 1
        self._may_hold = True
        self._send({"do": "freeze", "seconds": seconds, "attempt": self._attempt})
        if release:
            self._send({"do": "release"})
        answer = self._answer("frozen", seconds + GRACE_SECONDS)
        if answer["failed"] is not None:
            self.thaw_quietly()
            raise _failure(self.file_systems[answer["failed"]], answer["errno"], seconds)
        return Frozen(self._named(answer["frozen"]), self._named(answer["unable"]), time.monotonic() - started)

    def _named(self, numbers: Sequence[int]) -> tuple[FileSystem, ...]:
        return tuple(self.file_systems[number] for number in numbers)

    def thaw(self) -> None:
        """Thaw all. Raises FreezeExpired if the watchdog had to, StasisError if somebody else had thawed one."""
        if not self.file_systems:
            if time.monotonic() > self._deadline:
                raise self._expired()
            return
        self._send({"do": "thaw"})
        answer = self._answer("thawed", GRACE_SECONDS)
        self._may_hold = bool(answer["stuck"])
        if answer["expired"]:
            raise self._expired()
        for number in (*answer["others"], *answer["stuck"]):
            target = self.file_systems[number].target
            if number in answer["stuck"]:
                raise StasisError(f"{target} could not be thawed", hint=f"fsfreeze -u {target}")
            raise StasisError(f"somebody else thawed {target} while it was copied", hint=RETRY)

    def _expired(self) -> FreezeExpired:
        return FreezeExpired(f"the freeze had to end after {self._limit:g} s, before everything was copied", hint=RETRY)

    def thaw_quietly(self) -> None:
        """Thaw all on the way out of another failure."""
        with contextlib.suppress(StasisError):
            self.thaw()

    def restore_later(self, descriptor: int, text: str) -> None:
        """Have `text` written to a file when we end, in whatever way, or when a freeze releases it."""
        if self._process is None:
            self._start()
        self.await_start()
        data = json.dumps({"do": "restore", "text": text}).encode()
        try:
            socket.send_fds(self._control, [data], [descriptor])
        except OSError as error:
            raise self._died() from error

    # -- talking ------------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError as error:
            raise self._died() from error

    def _answer(self, kind: str, seconds: float) -> dict[str, Any]:
        """The next answer of this kind; one of another kind is late news of what is over."""
        deadline = time.monotonic() + seconds
        while True:
            answer = self._receive(max(0.0, deadline - time.monotonic()))
            if answer is None:
                raise self._died()
            if kind in answer and answer.get("attempt", self._attempt) == self._attempt:
                return answer

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        self._control.settimeout(seconds or 0.001)
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            return None
        finally:
            self._control.settimeout(None)
        answer: dict[str, Any] | None = json.loads(data) if data else None
        return answer

    def _died(self) -> StasisError:
        """The watchdog is gone or stopped: do its work."""
        state = "does not answer" if self._process is not None and self._process.poll() is None else "ended"
        self._thaw_here()
        after = "; the file systems are thawed" if self._may_hold else " before anything was frozen"
        return StasisError(f"the watchdog of the freeze {state} (pid {self.pid}){after}", hint=RETRY)

    def _thaw_here(self) -> None:
        if not self._may_hold:
            return  # what is frozen is somebody else's
        for file_system in reversed(self.file_systems):
            with contextlib.suppress(OSError):  # it cannot be frozen either, then
                freeze.thaw(file_system.fd)


def _failure(file_system: FileSystem, code: int, seconds: float) -> StasisError:
    where = f"{file_system.target} ({file_system.fstype})"
    if code == errno.EBUSY:
        return BusyError(f"{where} is frozen already by somebody else",
                         hint=f"wait for them, or thaw it with fsfreeze -u {file_system.target}")
    if code == errno.ETIMEDOUT:
        return FreezeExpired(f"{where} did not come to rest within {seconds:g} s", hint="allow a longer freeze with "
                             "--max-freeze, or choose a time when less is written")
    return StasisError(f"{where} cannot be frozen: {os.strerror(code)}", errno=code, hint=RETRY)
