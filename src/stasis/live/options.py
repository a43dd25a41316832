# SPDX-License-Identifier: Apache-2.0
"""How a live device may be treated while it is copied."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ON_BUSY", "LiveOptions"]

ON_BUSY = ("freeze", "throttle", "fail")


@dataclass(frozen=True)
class LiveOptions:
    """max_freeze, busy_freeze: seconds that file systems may rest, usually and when too much is written.

    on_busy: what to do then: "freeze" rests for up to busy_freeze, "throttle" slows the writing cgroups, "fail" stops.
    memory: bytes for what is copied late. rounds: of copying to the repository, at most.
    """

    max_freeze: float = 0.2
    busy_freeze: float = 2.0
    on_busy: str = "freeze"
    memory: int = 256 << 20
    rounds: int = 6
