# SPDX-License-Identifier: Apache-2.0
"""A stream of a whole backup becomes an image file, on a machine that needs no repository for it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stasis.backup.progress import Progress
from stasis.backup.streams.newfile import new_file
from stasis.backup.streams.rbddiff import StreamReader
from stasis.backup.streams.receive import Counted
from stasis.errors import UsageError

__all__ = ["ImageResult", "receive_image"]


@dataclass(frozen=True)
class ImageResult:
    """The image that was made of a stream; sizes are bytes."""

    path: str
    sent_as: str
    size: int
    bytes_data: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def receive_image(stream: StreamReader, path: Path, progress: Progress | None = None) -> ImageResult:
    """Write the image of a stream to a new file, which gets its name when it is complete and durable.

    Raises UsageError for a stream that builds on another backup, BusyError when the file exists, DamagedError.
    """
    started = time.monotonic()
    if stream.head.from_snap is not None:
        raise UsageError(f"this stream holds only what changed since backup {stream.head.from_snap[:12]}",
                         hint="receive it into a repository that has that backup, or send the backup without --from")
    counted = Counted(stream, progress or Progress())
    with new_file(path) as (fd, _):
        os.ftruncate(fd, stream.head.size)
        for offset, length, data in counted.pieces():
            if data is not None:  # a new file is zeroes everywhere
                _write(fd, data[:length], offset)
    return ImageResult(str(path), stream.head.to_snap, stream.head.size, counted.bytes_data,
                       round(time.monotonic() - started, 3))


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
