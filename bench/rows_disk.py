# SPDX-License-Identifier: Apache-2.0
"""First writes with a snapshot held on slow disks, and what they cost in bytes read and stored.

The cgroup gives reads and writes a budget each, so the read that a first write needs takes nothing from the
write: on such a disk a pipeline can reach 1.0. On a disk with one budget for both the same pipeline reaches 0.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fio
from fio import CHUNK, Load
from groups import Bench, alternate, group
from lab import MIB, Lab
from ours import Stasis
from report import Row, ratio_row, value_row
from rows_snapshot import NAMES, held
from throttle import IOPS, RATE, SlowDisk, make_slow_directory, make_slow_disk

DISK_SIZE = 512 * MIB
STORAGE_SIZE = 4096 * MIB  # sparse; it must hold two portions of the difference storage
SEQUENTIAL_LIMIT = 0.49
RANDOM_LIMIT = 0.50
TOOLS = ("fio", "losetup", "mkfs.ext4")
AGAIN_LIMIT = 0.98
BYTES_LIMIT = 1.1


@dataclass(frozen=True, slots=True)
class SlowPair:
    """An origin and a storage, each a slow disk of its own, and stasis between them."""

    lab: Lab
    stasis: Stasis
    uri: str
    origin: SlowDisk
    storage: SlowDisk
    directory: Path

    def flush(self) -> float:
        """Have what the kernel still holds in memory for the storage written to its disk; the seconds it took."""
        started = time.monotonic()
        self.lab.run(["sync", "--file-system", self.directory])
        return time.monotonic() - started


def set_up(lab: Lab) -> SlowPair:
    """Serve a slow origin with direct I/O; snapshots keep old contents on another slow device."""
    origin = make_slow_disk(lab, lab.data_file("origin.img", DISK_SIZE))
    storage, directory = make_slow_directory(lab, STORAGE_SIZE)
    stasis = Stasis(lab).start()
    return SlowPair(lab, stasis, stasis.attach(origin.path, "disk"), origin, storage, directory)


def random_load(bench: Bench, lab: Lab) -> Load:
    """As many 4 KiB writes as the disk takes in the bench's seconds, each in another chunk."""
    count = min(DISK_SIZE // CHUNK, int(IOPS * bench.seconds))
    return Load("write", fio.BLOCK, DISK_SIZE, trace=fio.first_touch_trace(lab.path("random"), DISK_SIZE, count, 5))


def sequential_load(bench: Bench, lab: Lab, block_size: int) -> Load:
    """As many bytes, from the beginning, as the disk takes in the bench's seconds."""
    total = min(DISK_SIZE, int(RATE * bench.seconds))
    writes = [(offset, block_size) for offset in range(0, total, block_size)]
    return Load("write", block_size, DISK_SIZE, trace=fio.write_trace(lab.path(f"seq{block_size}"), writes))


@group("disk-4k-random", "disk-4k-bytes-read", "disk-4k-bytes-stored", tools=TOOLS, needs_root=True)
def disk_random(bench: Bench) -> list[Row]:
    """4 KiB random first writes, with the bytes that each user byte costs."""
    with bench.lab.scope() as lab:
        pair = set_up(lab)
        read: list[float] = []
        stored: list[float] = []

        def count(user_bytes: int, before: tuple[int, int], after: tuple[int, int]) -> None:
            read.append((after[0] - before[0]) / user_bytes)
            stored.append((after[1] - before[1]) / user_bytes)

        row = _first_writes(bench, pair, random_load(bench, lab), "disk-4k-random", RANDOM_LIMIT, count)
    title = "bytes {} per user byte, 4 KiB random first writes"
    return [
        row,
        value_row("disk-4k-bytes-read", title.format("read from the origin"), read, BYTES_LIMIT, "B"),
        value_row("disk-4k-bytes-stored", title.format("written to the storage"), stored, BYTES_LIMIT, "B"),
    ]


@group("disk-64k-sequential", tools=TOOLS, needs_root=True)
def disk_sequential_64k(bench: Bench) -> list[Row]:
    """64 KiB sequential first writes."""
    return _sequential(bench, CHUNK, "disk-64k-sequential")


@group("disk-1m-sequential", tools=TOOLS, needs_root=True)
def disk_sequential_1m(bench: Bench) -> list[Row]:
    """1 MiB sequential first writes."""
    return _sequential(bench, MIB, "disk-1m-sequential")


def _sequential(bench: Bench, block_size: int, name: str) -> list[Row]:
    with bench.lab.scope() as lab:
        pair = set_up(lab)
        load = sequential_load(bench, lab, block_size)
        return [_first_writes(bench, pair, load, name, SEQUENTIAL_LIMIT, lambda size, before, after: None)]


Count = Callable[[int, tuple[int, int], tuple[int, int]], None]


def _first_writes(bench: Bench, pair: SlowPair, load: Load, name: str, limit: float, count: Count) -> Row:
    def with_snapshot(number: int) -> float:
        with held(pair.lab, pair.stasis, pair.directory):
            before = _counters(pair)
            rate, moved = _flushed_rate(pair, load)
            count(moved, before, _counters(pair))
            return rate

    def without(number: int) -> float:
        return _flushed_rate(pair, load)[0]

    figures = alternate(bench, {NAMES[0]: with_snapshot, NAMES[1]: without})
    what = name.removeprefix("disk-").replace("-", " ")
    title = f"first write with a snapshot held / without, disk-bound, {what}"
    return ratio_row(name, title, figures[NAMES[0]], figures[NAMES[1]], limit, NAMES, "bytes/s")


def _flushed_rate(pair: SlowPair, load: Load) -> tuple[float, int]:
    """(bytes/s, bytes) of a load, counting the time until the storage has on its disk what was stored.

    Without that the page cache would hide the storage's disk: old contents need not survive a power cut, so
    stasis writes them buffered. The origin takes direct writes and has nothing to flush.
    """
    pair.flush()
    result = fio.run(pair.lab, pair.uri, load)
    return result.bytes_moved / (result.seconds + pair.flush()), result.bytes_moved


def _counters(pair: SlowPair) -> tuple[int, int]:
    """(bytes read from the origin, bytes written to the storage)."""
    return pair.origin.counters()[0], pair.storage.counters()[1]


@group("disk-again", tools=TOOLS, needs_root=True)
def disk_again(bench: Bench) -> list[Row]:
    """The same blocks written again while the snapshot is still held, against no snapshot."""
    with bench.lab.scope() as lab:
        pair = set_up(lab)
        load = random_load(bench, lab)

        def again(number: int) -> float:
            with held(lab, pair.stasis, pair.directory):
                fio.run(lab, pair.uri, load)
                return fio.run(lab, pair.uri, load).bandwidth

        figures = alternate(bench, {NAMES[0]: again, NAMES[1]: lambda _: fio.run(lab, pair.uri, load).bandwidth})
    title = "the same blocks written again, snapshot still held / without, disk-bound"
    return [ratio_row("disk-again", title, figures[NAMES[0]], figures[NAMES[1]], AGAIN_LIMIT, NAMES, "bytes/s")]
