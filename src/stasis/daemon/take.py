# SPDX-License-Identifier: Apache-2.0
"""Taking a snapshot of several devices at one instant, or of none.

Two phases. `prepare` does on every worker whatever can fail. Then every worker is held: it finishes its batch and
starts no other. Only when all hold does the first one switch, and only when all have switched is the first let go; so
there is an instant between the last hold and the first switch at which no device has a write in flight, and that
instant is the snapshot. Any failure before the end lets all go as they were: `abort` undoes switch and prepare, and so
does the end of the connection, which covers the death of the daemon. The proof is docs/design/coherent-take.md.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stasis.daemon.channel import Channel
from stasis.errors import StasisError

__all__ = ["Participant", "Switched", "TakeResult", "take"]


@dataclass(frozen=True)
class Participant:
    """A device that takes part. `channel` is used by this take alone."""

    name: str
    channel: Channel
    prepare: dict[str, Any]
    storage_fd: int


@dataclass(frozen=True)
class Switched:
    """What one device tells of its switch: the epoch that ended, and how long the worker was held (nanoseconds)."""

    name: str
    generation: str
    change_number: int
    wrapped: bool
    held_ns: int


@dataclass(frozen=True)
class TakeResult:
    """`hold_ns` is from the first hold sent to the last release answered."""

    hold_ns: int
    devices: list[Switched]


def take(participants: Sequence[Participant], timeout_ms: int) -> TakeResult:
    """Take all or none. Raises the first error; every worker then goes on as if nothing had been asked."""
    with _abort_on_error(participants):
        _all(participants, "prepare")
        started = time.monotonic_ns()
        _all(participants, "hold", timeout_ms=timeout_ms)
        switched = _all(participants, "switch")
        released = _release(participants)
        hold_ns = time.monotonic_ns() - started
    return TakeResult(hold_ns, [
        Switched(participant.name, str(answer["generation"]), int(answer["change_number"]), bool(answer["wrapped"]),
                 int(ended.get("held_ns", 0)))
        for participant, answer, ended in zip(participants, switched, released, strict=True)
    ])


def _all(participants: Sequence[Participant], op: str, **arguments: Any) -> list[dict[str, Any]]:
    """Ask everybody, then wait for everybody, so that the workers do it at the same time.

    Every answer is read even if one is an error: a later abort must not take a late answer for its own.
    """
    answers, asked, failures = [], [], []
    for participant in participants:
        try:
            _send(participant, op, arguments)
            asked.append(participant)
        except StasisError as error:
            failures.append(error)
    for participant in asked:
        try:
            answers.append(participant.channel.receive(op)[0])
        except StasisError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return answers


def _send(participant: Participant, op: str, arguments: dict[str, Any]) -> None:
    if op == "prepare":
        participant.channel.send(op, [participant.storage_fd], **participant.prepare)
    else:
        participant.channel.send(op, **arguments)


def _release(participants: Sequence[Participant]) -> list[dict[str, Any]]:
    """Let everybody go. All have switched: the snapshot is taken.

    A worker that dies now has its switched map and its empty chunk table on file, and the next worker resumes with
    them; a worker that let go by itself because the take was late has undone its switch, which is an error.
    """
    return _all(participants, "release")


@contextlib.contextmanager
def _abort_on_error(participants: Sequence[Participant]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for participant in participants:
            with contextlib.suppress(StasisError):
                participant.channel.send("abort")
        for participant in participants:
            with contextlib.suppress(StasisError):
                participant.channel.receive("abort")
        raise
