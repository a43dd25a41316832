# SPDX-License-Identifier: Apache-2.0
"""Beginning the tracers of several devices at one instant, or none, as daemon/take.py does it with snapshots.

Every worker is held between two batches before the first one begins, and the first is let go only when all have begun.
A worker whose hold ends in any other way than by `release` ends what it began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from stasis.daemon.channel import Channel
from stasis.daemon.paths import Directories
from stasis.errors import StasisError

__all__ = ["begin"]


def begin(directories: Directories, names: list[str], prefix: str) -> dict[str, dict[str, Any]]:
    """Begin on all of these devices: what each tells of its tracer. Raises the first error; none has begun then."""
    with contextlib.ExitStack() as stack:
        channels = {}
        for name in names:
            connected = Channel.connect(directories.worker_control(name), name, timeout=30.0)
            channels[name] = stack.enter_context(connected)
        _all(channels, f"{prefix}.hold")
        begun = _all(channels, "begin")
        _all(channels, "release")
        return begun


def _all(channels: Mapping[str, Channel], op: str) -> dict[str, dict[str, Any]]:
    """Ask everybody, then hear everybody, so that they do it at the same time."""
    for channel in channels.values():
        channel.send(op)
    answers: dict[str, dict[str, Any]] = {}
    failures: list[StasisError] = []
    for name, channel in channels.items():
        try:
            answers[name] = channel.receive(op)[0]
        except StasisError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return answers
