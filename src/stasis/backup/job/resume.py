# SPDX-License-Identifier: Apache-2.0
"""The chunks that an interrupted backup had stored already, so that the next run need not read them again.

`STATE/backup/NAME.done` holds a header (what was being backed up, and the mark of its snapshot) and 32 bytes per chunk:
its name once it is stored. The next run asks tracking what changed since that mark; chunks that did not change, and are
still in the repository, are taken over. Where nothing is tracked there is no such file, and a repeated run finds its
chunks in the repository by their contents alone: it reads again, and uploads nothing twice.

The file is not made durable: it counts only on the boot that wrote it, while the page cache has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stasis.backup.job.plan import ChunkRange
from stasis.backup.source import Mark
from stasis.block.statefiles import writing

__all__ = ["NAME_SIZE", "ResumeFile"]

NAME_SIZE = 32
HEADER_SIZE = 4096
VERSION = 1
UNKNOWN = bytes(NAME_SIZE)
# All zeroes is the name of a zero chunk, and what a hole of the file reads as: they must not be taken for each other.
ZERO_CHUNK = b"\xff" * NAME_SIZE


class ResumeFile:
    """Names of stored chunks by number. Threads may call `note` and `names` at the same time."""

    def __init__(self, path: Path, identity: dict[str, Any], count: int) -> None:
        """identity: what must be the same for a continuation (repository, device, size, chunk size)."""
        self.path = path
        self._identity = {**identity, "version": VERSION, "boot": _boot_id()}
        self._count = count
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.has_names = False

    def earlier_mark(self) -> Mark | None:
        """The mark of the interrupted run; None if there was none for the same device, repository and size."""
        try:
            header = json.loads(os.pread(self._fd, HEADER_SIZE, 0).rstrip(b"\0"))
            if header["identity"] != self._identity:
                return None
            return Mark(str(header["generation"]), int(header["number"]))
        except (ValueError, KeyError, TypeError):
            return None

    def begin(self, mark: Mark, stale: Sequence[ChunkRange] | None) -> None:
        """Start a run at `mark`. stale: chunks that changed since the earlier mark; None drops all that was there."""
        with writing(self.path):
            self._begin(mark, stale)
        self.has_names = stale is not None

    def _begin(self, mark: Mark, stale: Sequence[ChunkRange] | None) -> None:
        if stale is None:
            os.ftruncate(self._fd, 0)
        for first, count in stale or ():
            self._clear(first, count)
        os.ftruncate(self._fd, HEADER_SIZE + self._count * NAME_SIZE)
        header = {"identity": self._identity, "generation": mark.generation, "number": mark.number}
        os.pwrite(self._fd, json.dumps(header).encode().ljust(HEADER_SIZE, b"\0"), 0)

    def _clear(self, first: int, count: int) -> None:
        for start in range(first, first + count, 4096):
            length = min(4096, first + count - start)
            os.pwrite(self._fd, bytes(length * NAME_SIZE), HEADER_SIZE + start * NAME_SIZE)

    def names(self, first: int, count: int) -> list[bytes | None]:
        """The names of a run of chunks, None for those that are not known to be stored."""
        data = os.pread(self._fd, count * NAME_SIZE, HEADER_SIZE + first * NAME_SIZE).ljust(count * NAME_SIZE, b"\0")
        cut = (data[at : at + NAME_SIZE] for at in range(0, len(data), NAME_SIZE))
        return [None if name == UNKNOWN else UNKNOWN if name == ZERO_CHUNK else name for name in cut]

    def note(self, first: int, names: Sequence[bytes]) -> None:
        """A run of chunks is stored under these names."""
        data = b"".join(ZERO_CHUNK if name == UNKNOWN else name for name in names)
        with writing(self.path):
            os.pwrite(self._fd, data, HEADER_SIZE + first * NAME_SIZE)

    def close(self) -> None:
        """Close the file; what it says stays for the next run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The backup is complete: nothing is left to continue."""
        self.path.unlink(missing_ok=True)
        self.close()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
