# SPDX-License-Identifier: Apache-2.0
"""`blksnap snapshot_waitevent` and `snapshot_watcher`.

An event goes to one of those who wait, as blksnap's do; a watcher sees all of them. What stasis tells beyond blksnap's
two events (that the storage grows, that the map starts over) is left out: a script may take what it does not know for
a failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stasis.blksnap.console.numbers import timeout_ms
from stasis.cli.blksnap.session import Session, device_number, failing
from stasis.errors import StasisError

if TYPE_CHECKING:
    from stasis.daemon.model import Event

__all__ = ["snapshot_waitevent", "snapshot_watcher"]

CORRUPTED, NO_SPACE = 0, 1
KNOWN = (CORRUPTED, NO_SPACE)
WAKING = (signal.SIGINT, signal.SIGCONT)
"""What interrupts the wait in the kernel: a signal that a handler takes, and being stopped and continued."""
TIME_LABEL = 0xFFFFFFFF
"""The watcher cuts the nanoseconds to 32 bits."""


class _Interrupted(BaseException):
    """A signal came while we waited. No Exception: nothing on its way may take it for a failure."""


def snapshot_waitevent(session: Session) -> None:
    """Wait for one event and print it."""
    client = session.client
    uuid, milliseconds = session.require_uuid(), timeout_ms(session.require("timeout"))
    with failing("Failed to get event from snapshot"):
        try:
            with _interruptible():
                event = client.take_event(uuid, timeout=milliseconds / 1000, codes=KNOWN)
        except _Interrupted:
            _show_result(session, "interrupted")
        except StasisError as error:
            if error.errno != errno.ESRCH:
                raise
            _show_result(session, "not found")
        else:
            _show_event(session, event)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    def interrupt(_number: int, _frame: object) -> None:
        raise _Interrupted

    before = {number: signal.signal(number, interrupt) for number in WAKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_result(session: Session, result: str) -> None:
    session.show({"result": result}, f"result={result}")


def _show_event(session: Session, event: Event | None) -> None:
    if event is None:
        _show_result(session, "timeout")
        return
    session.show({"result": "ok", **_as_dict(session, event)}, "result=ok", f"time={event.time}",
                 f"event={event.event if event.code in KNOWN else event.code}")  # fmt: skip


def _as_dict(session: Session, event: Event) -> dict[str, Any]:
    told: dict[str, Any] = {"time": event.time, "event": event.event}
    if event.code == CORRUPTED:
        return {**told, "device": _number(session, event.device), "error_code": abs(event.error_code)}
    return {**told, "requested": event.requested}


def _number(session: Session, name: str) -> str:
    """MAJOR:MINOR of a device that may be gone."""
    found = [device for device in session.client.devices() if device.name == name]
    return device_number(found[0]) if found else "0:0"


def snapshot_watcher(session: Session) -> None:
    """Print events until an image is lost or the snapshot is released."""
    _ = session.client
    uuid = session.require_uuid()
    _say(session, "Start snapshot watcher.")
    try:
        with failing("Failed to get event from snapshot"):
            _watch(session, uuid)
    except StasisError as error:
        if not session.as_json:
            print(error.message, file=sys.stderr)
        raise StasisError("Snapshot watcher failed.", hint=error.hint, errno=error.errno) from error
    _say(session, "Snapshot watcher finished")


def _watch(session: Session, uuid: str) -> None:
    try:
        for event in session.client.watch(uuid):
            if event.code in KNOWN:
                _tell(session, event)
            if event.code == CORRUPTED:
                return
    except StasisError as error:
        if error.errno != errno.ESRCH:
            raise
    _say(session, "Snapshot not found")


def _say(session: Session, text: str) -> None:
    """A line for people; JSON has the events only."""
    if not session.as_json:
        print(text, flush=True)


def _tell(session: Session, event: Event) -> None:
    label = event.time & TIME_LABEL
    if event.code == CORRUPTED:
        where, reason = _number(session, event.device), os.strerror(abs(event.error_code))
        text = f'{label} - The snapshot was corrupted for device [{where}] with error "{reason}".'
    else:
        text = (f"{label} - The the difference storage already grow up to {event.requested >> 20} MiB. "
                "Limit has been reached.")  # fmt: skip
    session.show(_as_dict(session, event), text)
