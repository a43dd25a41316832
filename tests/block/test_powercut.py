# SPDX-License-Identifier: Apache-2.0
"""No power cut makes a change go unnoticed.

Every write to the origin counts as having reached the disk the moment it was issued. Map and log are left as any cut
could leave them, at every point between two system calls: after it, each block written since a snapshot whose number
somebody was told is reported as changed since, or the generation is another one and the next backup is full.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from stasis.block import mapformat, tracking
from stasis.block.changemap import Identity
from stasis.block.tracking import Tracker
from tests.block.powercut import Disk

SHIFT, REGION_SHIFT = 12, 17
BLOCK = 1 << SHIFT
SIZE = 3 * 4096 * BLOCK
"""Blocks for several pages of each map and several sectors of the log."""
POOL = (0, 1, 2, 5, 600, 4094, 4095, 4096, 8191, 12287)
"""Few blocks, so that they are written again and again, on different pages, sectors and regions."""
OWNED = Identity(1, 2, SIZE, 1 << 60)
ALWAYS = 1 << 62
EXAMPLES = 5000 if settings.default.max_examples > 100 else 100


class Machine:
    """A device and its tracker on a disk whose power fails all the time."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.patch = patch
        self.boots = 0
        patch.setattr(mapformat, "this_boot", lambda: self.boots.to_bytes(16, "big"))
        patch.setattr(tracking, "_boot_time", lambda: ALWAYS)
        self.root, self.count = directory, 0
        self.size = self.other_size = SIZE
        self.written: dict[tuple[str, int], set[int]] = {}
        """By (generation, number): the blocks written since."""
        self.known: set[tuple[str, int]] = set()
        """Those of them that were told to somebody, who may ask for the changes since."""
        self.pending: list[tuple[str, int]] = []
        self.end_sync: Callable[[], None] | None = None
        self.cuts = self.kept = 0
        self._on(self._fresh_directory())
        self._begin_epoch()
        self.told()

    def _fresh_directory(self) -> Path:
        self.count += 1
        path = self.root / str(self.count)
        path.mkdir()
        return path

    def _on(self, directory: Path) -> None:
        """Put the disk under a directory and open the tracker there."""
        self.directory = directory
        self.disk = Disk(directory, self.patch, self.cut)
        for path in sorted(directory.iterdir()):
            with path.open("rb") as file:
                found = self.disk._file(file.fileno())
            assert found is not None
            found.observe(0)
            found.synced(found.seen, 0)
        self.tracker, _ = self._opened(directory, self.size, continuous=False)

    def _opened(self, directory: Path, size: int, *, continuous: bool) -> tuple[Tracker, tracking.Opening]:
        return Tracker.open(directory, size, SHIFT, REGION_SHIFT, OWNED, continuous=continuous)

    def close(self) -> None:
        self.tracker.close()
        self.disk.close()

    # -- what a cut leaves ------------------------------------------------------------------------

    def cut(self) -> None:
        """The power fails here, in all its ways."""
        self.disk.paused = True
        try:
            for state in self.disk.states(2, self.random):
                self._look_at(state)
        finally:
            self.disk.paused = False

    def _look_at(self, state: dict[str, bytes | None]) -> None:
        directory = self.root / "after"
        directory.mkdir(exist_ok=True)
        for name in ("map", "intent"):
            (directory / name).unlink(missing_ok=True)
            if (contents := state.get(name)) is not None:
                (directory / name).write_bytes(contents)
        self.boots += 1
        self.cuts += 1
        tracker, opening = self._opened(directory, self.random.choice([self.size, self.other_size]), continuous=False)
        try:
            self.kept += not opening.fresh
            self._nothing_missed(tracker)
        finally:
            tracker.close()
            self.boots -= 1

    def _nothing_missed(self, tracker: Tracker) -> None:
        for (generation, number), blocks in self.written.items():
            if generation != tracker.changes.generation or (generation, number) not in self.known:
                continue
            found = tracker.changes.changed_extents(number, generation=generation)
            reported = {block for offset, length in found for block in range(offset >> SHIFT, offset + length >> SHIFT)}
            missed = {block for block in blocks if block << SHIFT < tracker.changes.capacity} - reported
            assert not missed, f"blocks {sorted(missed)} changed since {number} and are not reported"

    # -- what the machine does --------------------------------------------------------------------

    def write(self, blocks: list[int]) -> None:
        requests = [(block << SHIFT, BLOCK, 0) for block in blocks if block << SHIFT < self.size]
        self.tracker.mark(requests)
        for offset, _, _ in requests:
            for since in self.written.values():
                since.add(offset >> SHIFT)
        self.disk.step()

    @property
    def now(self) -> tuple[str, int]:
        return self.tracker.changes.generation, self.tracker.changes.change_number

    def _begin_epoch(self, *numbers: tuple[str, int]) -> None:
        self.pending = [self.now, *numbers]
        self.written.update({number: set() for number in self.pending})

    def switch(self) -> None:
        """Take a snapshot. Its number is told to nobody before `told`."""
        self.told()
        self.tracker.changes.prepare_switch()
        result = self.tracker.switch()
        self._begin_epoch((result.generation, result.change_number))
        self.disk.step()
        self.tracker.changes.forget_undo()

    def undone(self) -> None:
        """A take that fails on another device."""
        self.told()
        self.tracker.changes.prepare_switch()
        self.tracker.switch()
        self.disk.step()
        self.tracker.changes.undo_switch()
        self.disk.step()

    def told(self) -> None:
        """The switch is settled, and the consumer notes generation and number."""
        self.tracker.settle()
        self.known.update(self.pending)
        self.pending = []
        self.disk.step()

    def begin_clearing(self) -> None:
        if self.end_sync is None and self.tracker.start_clearing():
            self.end_sync = self.disk.begin_sync(self.tracker.changes.fd)

    def end_clearing(self, synced: bool) -> None:
        if self.end_sync is not None:
            if synced:
                self.end_sync()
            self.end_sync = None
            self.tracker.end_clearing(synced)
            self.disk.step()

    def many_takes(self) -> None:
        """On to the number before the wrap."""
        self.told()
        while self.tracker.changes.number < 254:
            self.tracker.changes.switch()
        self.tracker.changes.forget_undo()
        self._begin_epoch()
        self.told()

    def resize(self, blocks: int) -> None:
        """The device gets another size; whether its new size survives a cut is the file system's affair."""
        self.end_clearing(False)
        self.other_size, self.size = self.size, blocks << SHIFT
        self.tracker.begin_anew(self.size, SHIFT, REGION_SHIFT, OWNED, "new generation: resized")
        self.other_size = self.size
        self._begin_epoch()
        self.told()

    def worker_dies(self) -> None:
        """What it had not settled was told to nobody; a switch may stand or not."""
        self.end_sync, self.pending = None, []
        self.tracker.close()
        self.tracker, opening = self._opened(self.directory, self.size, continuous=True)
        assert not opening.fresh
        self.pending = [self.now]

    def stop_and_start(self, *, boot: bool) -> None:
        self.end_clearing(True)
        self.told()
        self.tracker.finish(OWNED)
        self.disk.step()
        self.tracker.close()
        self.boots += boot
        self.tracker, opening = self._opened(self.directory, self.size, continuous=False)
        assert not opening.fresh
        assert not opening.reason

    def reboot(self) -> None:
        """The power fails for good, and the machine goes on with what is left."""
        states = list(self.disk.states(6, self.random))
        self.end_sync = None
        self.close()
        self.boots += 1
        directory = self._fresh_directory()
        for name, contents in self.random.choice(states).items():
            if contents is not None:
                (directory / name).write_bytes(contents)
        self._on(directory)
        self.pending = [self.now]
        self.written.setdefault(self.now, set())
        self._nothing_missed(self.tracker)


STEPS = st.one_of(
    st.tuples(st.just("write"), st.lists(st.sampled_from(POOL), min_size=1, max_size=3)),
    st.tuples(st.just("write"), st.lists(st.sampled_from(POOL), min_size=1, max_size=3)),
    st.tuples(st.just("begin_clearing")),
    st.tuples(st.just("end_clearing"), st.booleans()),
    st.tuples(st.just("switch")),
    st.tuples(st.just("told")),
    st.tuples(st.sampled_from(["undone", "worker_dies", "reboot", "many_takes"])),
    st.tuples(st.just("resize"), st.sampled_from([5, 4096, 12288, 20000])),
    st.tuples(st.just("stop"), st.booleans()),
)


@pytest.fixture(scope="module")
def fast_directory() -> Iterator[Path]:
    """Thousands of small files are made; memory is quicker than a disk."""
    with tempfile.TemporaryDirectory(prefix="stasis-powercut-", dir="/dev/shm") as path:
        yield Path(path)


@contextlib.contextmanager
def running(directory: Path, seed: int) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(dir=directory) as root, pytest.MonkeyPatch.context() as patch:
        machine = Machine(Path(root), patch, seed)
        try:
            yield machine
        finally:
            machine.close()


@settings(settings.get_profile("default"), max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=4, max_size=25), seed=st.integers(0, 1 << 32))
def test_no_cut_hides_a_change(fast_directory: Path, steps: list[tuple[object, ...]], seed: int) -> None:
    with running(fast_directory, seed) as machine:
        for name, *arguments in steps:
            if name == "stop":
                machine.stop_and_start(boot=bool(arguments[0]))
            else:
                getattr(machine, str(name))(*arguments)


def test_cuts_keep_the_generation(fast_directory: Path) -> None:
    """The promise above is not kept by beginning a new generation whenever the power fails."""
    with running(fast_directory, 1) as machine:
        machine.cuts = machine.kept = 0
        machine.write([1, 600])
        machine.switch()
        machine.told()
        machine.write([1, 4095])
        assert machine.cuts > 100
        assert machine.kept == machine.cuts


def test_only_written_regions_are_assumed_changed(fast_directory: Path) -> None:
    """After a cut in a quiet time nothing is assumed; after one under load the regions being written are."""
    with running(fast_directory, 1) as machine:
        machine.write([0, 4096])
        machine.switch()
        machine.told()
        machine.begin_clearing()
        machine.end_clearing(True)
        machine.disk._sync(machine.tracker.log.fd)
        machine.reboot()
        assert machine.tracker.changes.changed_extents(1) == []
        machine.write([8191])
        machine.reboot()
        region = 8191 >> (REGION_SHIFT - SHIFT)
        assert machine.tracker.changes.changed_extents(1) == [(region << REGION_SHIFT, 1 << REGION_SHIFT)]
        assert "1 regions assumed changed" in machine.tracker.changes.assumed
