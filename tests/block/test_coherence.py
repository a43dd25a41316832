# SPDX-License-Identifier: Apache-2.0
"""A snapshot of several devices shows all of them at one instant.

A writer puts the same number on device A, waits for the answer, then puts it on device B. At no instant is B ahead of
A, so no pair of images may show it, however often snapshots are taken meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stasis.nbd.client import Client
from tests.block.engine import pread
from tests.block.workers import WorkerProcess

SIZE = 1 << 20
PLACES = range(0, SIZE, 64 << 10)


class Writer(threading.Thread):
    """Writes 1, 2, 3 … to the same place of one device after the other."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        super().__init__()
        self.clients: list[Client] = [worker.client() for worker in workers]
        self.count = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            self.count += 1
            for client in self.clients:
                client.pwrite(PLACES[self.count % len(PLACES)], self.count.to_bytes(8, "big"))

    def end(self) -> None:
        self.ended.set()
        self.join()
        for client in self.clients:
            client.close()


@pytest.fixture
def pair(short_dir: Path, tmp_path: Path) -> Iterator[list[WorkerProcess]]:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(SIZE))
    with (
        WorkerProcess(short_dir, tmp_path / "a", "a") as first,
        WorkerProcess(short_dir, tmp_path / "b", "b") as second,
    ):
        yield [first, second]


def take_both(workers: Sequence[WorkerProcess]) -> None:
    """As the daemon does it: all are held before the first one switches, all have switched before one goes on."""
    for worker in workers:
        worker.prepare()
    for operation in ("hold", "switch", "release", "sync"):
        for worker in workers:
            worker.control.do(operation)


def newest(worker: WorkerProcess) -> int:
    """The highest number in the image."""
    with worker.image() as image:
        return max(int.from_bytes(pread(image, place, 8), "big") for place in PLACES)


def takes_are_coherent(workers: list[WorkerProcess], count: int) -> None:
    writer = Writer(workers)
    writer.start()
    seen = []
    try:
        for _ in range(count):
            take_both(workers)
            ahead, behind = (newest(worker) for worker in workers)
            assert behind <= ahead <= behind + 1
            seen.append(ahead)
            for worker in workers:
                worker.drop()
    finally:
        writer.end()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0], "nothing was written between the takes"


def test_no_image_is_ahead_of_the_other(pair: list[WorkerProcess]) -> None:
    takes_are_coherent(pair, 30)


@pytest.mark.slow
def test_no_image_is_ahead_of_the_other_for_long(pair: list[WorkerProcess]) -> None:
    takes_are_coherent(pair, 200)


def test_a_take_that_fails_on_one_device_leaves_both(pair: list[WorkerProcess]) -> None:
    """Both held, one switched, then the other one says no: both go on in the epoch they were in."""
    first, second = pair
    for worker in pair:
        worker.prepare()
        worker.control.do("hold")
    first.control.do("switch")
    for worker in pair:
        worker.control.do("abort")
    for worker in pair:
        assert worker.control.do("hello")["change_number"] == 0
        with worker.client() as client:
            client.pwrite(0, b"on they go")
        assert worker.changed(0) == [(0, 65536)]
    take_both(pair)
    assert [worker.control.do("hello")["change_number"] for worker in (first, second)] == [1, 1]
