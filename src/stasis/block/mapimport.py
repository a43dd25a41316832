# SPDX-License-Identifier: Apache-2.0
"""Change maps that somebody else keeps, put into our file format for our readers.

Who keeps such a map (a kernel module) tells it as of its last snapshot. What changed since is not known here, so in
the active map every block counts as changed: too much, never too little.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from stasis.block import mapformat as layout

__all__ = ["ForeignMap", "store"]


@dataclass(frozen=True)
class ForeignMap:
    """A map as of snapshot `number` (0 to 254) of a generation.

    `changes` has one byte per block of 2**shift bytes, None where they are not known: everything may have changed.
    `held` tells that the snapshot is held, `broken` that nothing can be concluded from this map.
    """

    capacity: int
    shift: int
    generation: str
    number: int
    changes: bytes | None
    held: bool
    assumed: str = ""
    broken: bool = False

    @property
    def block_count(self) -> int:
        return max(1, -(-self.capacity >> self.shift))


def store(path: Path, foreign: ForeignMap) -> None:
    """Put the map in the place of the file, at once: whoever has the old one open keeps reading that.

    Nothing is made durable: what the modules know ends with the boot, and so does the generation.
    """
    count = foreign.block_count
    changes = bytes((max(foreign.number, 1),)) * count if foreign.changes is None else foreign.changes
    if len(changes) != count or not 0 <= foreign.number < layout.HIGHEST_NUMBER:
        raise ValueError(f"{len(changes)} bytes for {count} blocks at number {foreign.number}")
    body = bytearray(layout.HEADER_SIZE + 2 * layout.padded(count))
    header = _header(foreign)
    body[: len(header)] = header
    body[layout.HEADER_SIZE : layout.HEADER_SIZE + count] = bytes((foreign.number + 1,)) * count
    start = layout.HEADER_SIZE + layout.padded(count)
    body[start : start + count] = changes
    temporary = path.with_suffix(".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(body)
    os.replace(temporary, path)


def _header(foreign: ForeignMap) -> bytes:
    generation = uuid.UUID(foreign.generation).bytes
    flags = layout.FLAG_CLEAN
    flags |= layout.FLAG_HELD if foreign.held else 0
    flags |= layout.FLAG_BROKEN if foreign.broken else 0
    return layout.sealed((
        layout.MAGIC, layout.VERSION, foreign.shift, foreign.capacity, foreign.block_count, generation, generation,
        foreign.number + 1, foreign.number, foreign.number, flags, layout.this_boot(), 0, 0, foreign.capacity, -1,
        foreign.assumed.encode()[:200],
    ))
