# SPDX-License-Identifier: Apache-2.0
"""A backup as a stream: all of it, or what differs from an earlier one, down to blocks of 4 KiB."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, cast

import zstandard

from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.streams import describe
from stasis.backup.streams.extents import Extents
from stasis.backup.streams.rbddiff import Head, StreamWriter

__all__ = ["SendResult", "send"]

LEVEL = 3
MOST_THREADS = 4
JOB_BYTES = 2 << 20  # what a thread packs at a time; the default took 80 MiB more memory and was no faster


@dataclass(frozen=True)
class SendResult:
    """What was sent, in bytes. bytes_sent: what went over the wire."""

    id: str
    base: str | None
    size: int
    bytes_data: int
    bytes_zero: int
    bytes_sent: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def send(repository: Repository, backup: Manifest, base: Manifest | None, sink: BinaryIO,
         progress: Progress | None = None) -> SendResult:
    """Write a backup, or what differs in it from `base`, to the sink.

    Raises UsageError when `base` is of another device, DamagedError for what cannot be read, OSError of the sink.
    """
    started = time.monotonic()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, threads=threads, job_size=JOB_BYTES,
                                                                write_checksum=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters)
    head = Head(backup.id, backup.size, base.id if base else None, describe.encode(backup, base))
    counted = _Counted(sink)
    packed = packer.stream_writer(cast(BinaryIO, counted), closefd=False)
    extents, writer = Extents(repository, backup, base), StreamWriter(packed, head)
    with repository.lock_shared("send"):
        for offset, length, data in extents.read(progress or Progress(), "sending"):
            if data is None:
                writer.zero(offset, length)
            else:
                writer.data(offset, data)
        writer.finish()
    packed.flush(zstandard.FLUSH_FRAME)  # not after an error: what is cut off must look so
    sink.flush()
    return SendResult(backup.id, base.id if base else None, backup.size, extents.bytes_data, extents.bytes_zero,
                      counted.total, round(time.monotonic() - started, 3))


class _Counted:
    """Counts what goes to a file."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self.total = 0

    def write(self, data: bytes) -> int:
        self.total += len(data)
        return self._sink.write(data)
