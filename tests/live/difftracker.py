# SPDX-License-Identifier: Apache-2.0
"""A change tracking for tests that needs no BPF: it compares the device with what it was at the turn before.

It keeps the promise of `stasis.live.tracked`: what is in the file when a turn looks at it is in that turn's extents or
earlier ones, what comes later is in later ones.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from stasis.block.copy.plan import clip, merge
from stasis.errors import GenerationError

BLOCK = 64 << 10


@dataclass(frozen=True)
class Mark:
    generation: str
    number: int


@dataclass
class Switch:
    tracker: DiffTracker
    extents: list[tuple[int, int]]

    def settle(self) -> Mark:
        return self.tracker.settle()


@dataclass
class DiffTracker:
    """Tracks a loop device by its backing file, read through the page cache that a loop device writes to."""

    image: Path
    block_size: int = BLOCK
    lost: str = ""
    generation: str = field(default_factory=lambda: str(uuid.uuid4()))
    number: int = 0
    switches: int = 0
    breaks_at_switch: int | None = None

    def __post_init__(self) -> None:
        self.seen = bytearray(self.image.read_bytes())
        self.last: dict[int, int] = {}

    def _different(self, *, take: bool = False) -> list[int]:
        """Blocks that are not as they were; `take`: from now on they are."""
        unit, found = self.block_size, []
        with self.image.open("rb", buffering=0) as file:
            for block, start in enumerate(range(0, len(self.seen), unit)):
                now = file.read(unit)
                if now != self.seen[start : start + len(now)]:  # a file that was cut short has less
                    found.append(block)
                    if take:
                        self.seen[start : start + len(now)] = now
        return found

    def check(self) -> None:
        if self.lost:
            raise GenerationError(f"the tracking is lost: {self.lost}")

    def _extents(self, blocks: list[int]) -> list[tuple[int, int]]:
        unit = self.block_size
        return clip(merge((block * unit, unit) for block in blocks), 0, len(self.seen))

    def changed_since(self, mark: Mark, /) -> list[tuple[int, int]]:
        self.check()
        if mark.generation != self.generation:
            raise GenerationError("another generation")
        now = self._different()
        return self._extents([*now, *(block for block, number in self.last.items() if number > mark.number)])

    def count_changed(self) -> int:
        return len(self._different())

    def turn(self) -> list[tuple[int, int]]:
        blocks = self._different(take=True)
        self.last.update(dict.fromkeys(blocks, self.number + 1))
        return self._extents(blocks)

    def prepare_switch(self) -> None:
        self.prepared = True

    def switch(self) -> Switch:
        self.switches += 1
        if self.switches == self.breaks_at_switch:
            self.lost = "a test broke it"
        return Switch(self, self.turn())

    def settle(self) -> Mark:
        self.number += 1
        return Mark(self.generation, self.number)

    def distrust(self, reason: str) -> None:
        self.lost = reason

    def begin_generation(self, reason: str) -> None:
        self.lost, self.generation, self.number, self.last = "", str(uuid.uuid4()), 0, {}
