# SPDX-License-Identifier: Apache-2.0
"""How a live device may be treated while it is copied."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stasis.linux import memlock
from stasis.live.staging import free_space

__all__ = ["ON_BUSY", "LiveOptions", "spare_memory"]

ON_BUSY = ("freeze", "throttle", "fail")


LEAST_MEMORY = 64 << 20


def spare_memory() -> int:
    """Bytes that may be taken for what changes late: a quarter of what is available, and 64 MiB at least."""
    return max(LEAST_MEMORY, memlock.available() // 4)


@dataclass(frozen=True)
class LiveOptions:
    """max_freeze, busy_freeze: seconds that file systems may rest, usually and when too much is written.

    on_busy: what to do then: "freeze" rests for up to busy_freeze, "throttle" slows the writing cgroups, "fail" stops.
    memory: bytes for what is copied late. staging: a directory for what does not fit there; staging_limit: the most it
    may take, None: what is free. rounds: of copying to the repository, at most.
    """

    max_freeze: float = 0.2
    busy_freeze: float = 2.0
    on_busy: str = "freeze"
    memory: int = field(default_factory=spare_memory)
    rounds: int = 6
    staging: Path | None = None
    staging_limit: int | None = None

    @property
    def room(self) -> int:
        """Bytes that may be copied late now, in memory and staged. Raises StorageError."""
        return self.memory + (free_space(self.staging, self.staging_limit) if self.staging is not None else 0)
