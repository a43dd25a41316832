# SPDX-License-Identifier: Apache-2.0
"""Changes of live disks of every kind on stock kernels: what tracking says is copied, and the copy is the disk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux.iobuffer import IoBuffer
from stasis.live import pins, tracking
from stasis.live.tracker import Tracker
from tests.live.writers import Mirror, Writers, state_directory
from tests.system.helpers import LONG
from tests.vm import livedisks
from tests.vm.machine import Disk

ROUNDS = 20 if LONG else 2
OPERATIONS = 24


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with state_directory(tmp_path / "state") as path:
        yield path


@contextlib.contextmanager
def tracked(nodes: list[str], state: Path) -> Iterator[list[Tracker]]:
    with contextlib.ExitStack() as stack:
        trackers = [stack.enter_context(tracking.start(node, state)) for node in nodes]
        yield trackers
        stack.close()
        for tracker in trackers:
            tracking.stop(tracker.identity.name, state)


def check_ground_truth(written: list[str], trackers: list[Tracker], seed: int, rounds: int = ROUNDS) -> None:
    """Writers of every kind, with turns and switches meanwhile, and a comparison with the disks at each end."""
    mirrors = [Mirror(tracker) for tracker in trackers]

    def turn() -> None:
        for mirror in mirrors:
            mirror.turn()

    def switch() -> None:
        for mirror in mirrors:
            mirror.switch()

    for number in range(rounds):
        Writers(written, seed + number).run(OPERATIONS, turn if number % 2 else switch)
        turn()
        missed = {mirror.node: mirror.missed() for mirror in mirrors}
        assert not any(missed.values()), (number, missed)
        for tracker in trackers:
            tracker.check()


@pytest.mark.parametrize("kind", livedisks.KINDS)
def test_no_write_is_missed(kind: str, disks: list[Disk], state: Path, tmp_path: Path, seed: int) -> None:
    with livedisks.KINDS[kind](disks, tmp_path) as disk, tracked(disk.tracked, state) as trackers:
        check_ground_truth(disk.written, trackers, seed)


def test_several_disks_share_one_set_of_programs(disks: list[Disk], state: Path, tmp_path: Path, seed: int) -> None:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(livedisks.KINDS[kind](disks, tmp_path)) for kind in ("nvme", "md", "zram", "loop")]
        nodes = [node for disk in made for node in disk.tracked]
        trackers = stack.enter_context(tracked(nodes, state))
        check_ground_truth([node for disk in made for node in disk.written], trackers, seed)


@pytest.mark.parametrize("kind", ["nvme", "md", "null_blk"])
def test_nothing_is_missed_while_others_come_and_go_at_the_tracepoints(
    kind: str, disks: list[Disk], state: Path, tmp_path: Path
) -> None:
    """Linux 6.18 at times forgets a program there while another is attached."""
    with (
        livedisks.KINDS[kind](disks, tmp_path) as disk,
        tracked(disk.tracked[:1], state) as (tracker,),
        state_directory(tmp_path / "other") as other,
        coming_and_going(other),
        IoBuffer(4096) as buffer,
    ):
        for _ in range(4 * ROUNDS):
            tracker.turn()
            touch_all(tracker, buffer)
            assert sum(length for _, length in tracker.turn()) == tracker.identity.size


def touch_all(tracker: Tracker, buffer: IoBuffer) -> None:
    """Write the beginning of each tracking block."""
    fd = os.open(tracker.identity.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for offset in range(0, tracker.identity.size, tracker.block_size):
            os.pwritev(fd, [buffer.view], offset)
    finally:
        os.close(fd)


@contextlib.contextmanager
def coming_and_going(directory: Path) -> Iterator[None]:
    """Another set of programs is attached and detached again and again."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with pins.locked():
                pins.Hooks.load(pins.directory_of(directory)).unload()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
