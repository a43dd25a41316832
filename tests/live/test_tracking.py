# SPDX-License-Identifier: Apache-2.0
"""Tracking as its users meet it: epochs, death, loss of every kind, and errors."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block import mapformat
from stasis.errors import BusyError, GenerationError, NotFoundError, StateError, UnsupportedError, UsageError
from stasis.linux import blockdev, loop
from stasis.live import devicefile, pins, programs, tracking
from stasis.live.errors import TrackingLostError
from stasis.live.layout import EPOCH, Lost, Slot
from stasis.live.tracker import Mark, Tracker
from tests.live.writers import MIB, bpf_works, loop_device, state_directory

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

SIZE = 32 * MIB
BLOCK = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def node(image: Path) -> Iterator[str]:
    with loop_device(image, SIZE) as node:
        yield node


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory with a device, so that the programs, which take long to load, stay for all tests."""
    directory = tmp_path_factory.mktemp("home")
    with loop_device(directory / "keeper", MIB) as node, state_directory(directory / "state") as path:
        tracking.start(node, path).close()
        yield path


@pytest.fixture
def state(home: Path) -> Iterator[Path]:
    kept = devicefile.names(home)
    yield home
    for name in set(devicefile.names(home)) - set(kept):
        tracking.stop(name, home)


@pytest.fixture
def own_state(tmp_path: Path) -> Iterator[Path]:
    """A state directory whose programs a test may take away."""
    with state_directory(tmp_path / "own") as path:
        yield path


@pytest.fixture
def tracker(node: str, state: Path) -> Iterator[Tracker]:
    with tracking.start(node, state) as tracker:
        yield tracker


@pytest.fixture
def own_tracker(node: str, own_state: Path) -> Iterator[Tracker]:
    with tracking.start(node, own_state) as tracker:
        yield tracker


def write(node: str, block: int, blocks: int = 1) -> None:
    """Change whole blocks, on the device when this returns."""
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, os.urandom(blocks * BLOCK), block * BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)


def reopened(tracker: Tracker, state: Path) -> Tracker:
    tracker.close()
    return Tracker.open(tracker.identity.name, state)


# -- what counts --------------------------------------------------------------------------------------


def test_reads_and_flushes_are_no_changes(tracker: Tracker) -> None:
    fd = os.open(tracker.identity.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        os.preadv(fd, [mmap.mmap(-1, MIB)], 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert tracker.turn() == []


@pytest.mark.parametrize("change", [blockdev.discard, blockdev.zero_out])
def test_discards_and_zeroes_change_their_blocks_however_long(tracker: Tracker, change: object) -> None:
    fd = os.open(tracker.identity.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        change(fd, 3 * BLOCK + 4096, 20 * MIB)  # type: ignore[operator]
    finally:
        os.close(fd)
    assert tracker.turn() == [(3 * BLOCK, 20 * MIB + BLOCK)]


def test_the_last_block_may_be_short(image: Path, state: Path) -> None:
    with loop_device(image, SIZE + 4096) as node, tracking.start(node, state) as tracker:
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        os.pwrite(fd, b"x" * 4096, SIZE)
        os.fsync(fd)
        os.close(fd)
        assert tracker.turn() == [(SIZE, 4096)]


# -- epochs -------------------------------------------------------------------------------------------


def test_numbers_tell_epochs_apart_and_rounds_use_none(tracker: Tracker) -> None:
    node = tracker.identity.path
    write(node, 1)
    first = tracker.switch().settle()
    write(node, 2)
    for _ in range(300):  # more than there are numbers
        tracker.count_changed()
    assert tracker.turn() == [(2 * BLOCK, BLOCK)]
    write(node, 3)
    second = tracker.switch().settle()
    write(node, 4)
    assert (first.number, second.number, first.generation) == (1, 2, second.generation)
    assert tracker.changed_since(first) == [(2 * BLOCK, 3 * BLOCK)]
    assert tracker.changed_since(second) == [(4 * BLOCK, BLOCK)]
    assert tracker.changed_since(Mark(first.generation, 0)) == [(BLOCK, 4 * BLOCK)]


def test_no_epoch_has_programs_of_both_bitmaps(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may take for done what another one of its epoch marked: never in the bitmap that was active before."""
    hooks, epochs = tracker._kernel(), list[bytes]()
    store = hooks.set_field

    def epoch() -> bytes:
        return hooks.table[EPOCH : EPOCH + 8]

    def noting(index: int, offset: int, value: int) -> None:
        before = epoch()
        store(index, offset, value)
        epochs.append(before)

    before = epoch()
    monkeypatch.setattr(hooks, "set_field", noting)
    tracker.turn()
    assert len({before, *epochs, epoch()}) == 3


def test_at_the_wrap_a_new_generation_begins_that_knows_the_newest_changes(tracker: Tracker) -> None:
    node = tracker.identity.path
    tracker.changes.number, tracker.changes.previous = 255, 254
    mark = tracker.switch().settle()
    assert mark.number == 255
    write(node, 7)
    assert tracker.mark.generation != mark.generation
    with pytest.raises(GenerationError):
        tracker.changed_since(mark)
    assert tracker.changed_since(tracker.mark) == [(7 * BLOCK, BLOCK)]


def test_a_switch_that_is_never_settled_loses_nothing(tracker: Tracker, state: Path) -> None:
    node = tracker.identity.path
    mark = tracker.switch().settle()
    write(node, 1)
    tracker.switch()
    write(node, 2)
    with pytest.raises(StateError):
        tracker.switch()
    with reopened(tracker, state) as again:
        assert again.mark == mark
        assert again.changed_since(mark) == [(BLOCK, 2 * BLOCK)]
        again.prepare_switch()
        assert again.switch().extents == [(BLOCK, 2 * BLOCK)]


def test_tracking_outlives_every_process(node: str, state: Path) -> None:
    """Started by a command that is killed; what is written afterwards is found by another."""
    code = ("import os, sys; from pathlib import Path; from stasis.live import tracking;"
            "tracking.start(sys.argv[1], Path(sys.argv[2])); os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, node, str(state)], check=False)
    write(node, 5)
    with Tracker.open(node, state) as tracker:
        assert tracker.changed_since(tracker.mark) == [(5 * BLOCK, BLOCK)]


# -- loss ---------------------------------------------------------------------------------------------


def is_lost_for_good(tracker: Tracker, state: Path, why: str) -> None:
    """Said again by every later look, and ended by a new generation only."""
    node = tracker.identity.path
    for _ in range(2):
        with pytest.raises(TrackingLostError, match=why):
            tracker.check()
        with pytest.raises(TrackingLostError):
            tracker.changed_since(tracker.mark)
        tracker = reopened(tracker, state)
    assert why in tracking.inspect(node, state).lost
    before = tracker.mark.generation
    tracker.begin_generation("a test")
    tracker.check()
    assert tracker.mark.generation != before
    write(node, 9)
    assert tracker.changed_since(tracker.mark) == [(9 * BLOCK, BLOCK)]
    tracker.close()


@pytest.mark.parametrize("in_order", [programs.STORES_IN_ORDER, ()], ids=["work shared", "work not shared"])
def test_any_program_for_completions_does_alone(node: str, own_state: Path, monkeypatch: pytest.MonkeyPatch,
                                                in_order: tuple[str, ...]) -> None:
    monkeypatch.setattr(programs, "STORES_IN_ORDER", in_order)
    with tracking.start(node, own_state) as tracker:
        for name in set(programs.PROGRAMS) - {programs.COMPLETIONS[-1]}:
            (pins.directory_of(own_state) / f"link_{name}").unlink()
        write(node, 9)
        with tracker._kernel().map_bits(0) as bits:
            assert int.from_bytes(bits[:], "little") == 1 << 9


@pytest.mark.parametrize("name", programs.COMPLETIONS)
def test_a_program_that_was_detached_is_a_loss(own_tracker: Tracker, own_state: Path, name: str) -> None:
    (pins.directory_of(own_state) / f"link_{name}").unlink()
    is_lost_for_good(own_tracker, own_state, "detached")


def test_programs_that_are_gone_are_a_loss(own_tracker: Tracker, own_state: Path) -> None:
    pins.remove(pins.directory_of(own_state))
    is_lost_for_good(reopened(own_tracker, own_state), own_state, "removed from the kernel")


def test_programs_that_were_loaded_anew_are_a_loss(own_tracker: Tracker, own_state: Path) -> None:
    with pins.locked():
        pins.Hooks.load(pins.directory_of(own_state)).close()
    is_lost_for_good(reopened(own_tracker, own_state), own_state, "removed from the kernel")


@pytest.mark.tool("losetup")
def test_a_loop_device_that_is_made_anew_is_another_one(tracker: Tracker, state: Path, image: Path) -> None:
    node = tracker.identity.path
    loop.detach(node)
    done = subprocess.run(["losetup", "--sizelimit", str(SIZE), node, image], capture_output=True)
    if done.returncode:
        pytest.skip("a test beside this one took the number of the device")
    is_lost_for_good(tracker, state, "another disk took its place")


def test_a_device_that_is_gone_is_a_loss(tracker: Tracker) -> None:
    loop.detach(tracker.identity.path)
    with pytest.raises(TrackingLostError, match="no size"):
        tracker.check()


@pytest.mark.tool("losetup")
def test_a_resize_is_a_loss(state: Path, image: Path) -> None:
    image.write_bytes(bytes(SIZE))
    node = loop.attach(str(image), 512, 0)
    try:
        with tracking.start(node, state) as tracker:
            os.truncate(image, SIZE + MIB)
            subprocess.run(["losetup", "--set-capacity", node], check=True)
            with pytest.raises(TrackingLostError, match="size"):
                tracker.check()
            tracker.begin_generation("a test")
            write(node, SIZE // BLOCK)
            assert tracker.turn() == [(SIZE, BLOCK)]
    finally:
        loop.detach(node)


@pytest.mark.parametrize(("flag", "why"),
                         [(Lost.OPAQUE, "command"), (Lost.IN_FLIGHT, "in flight"), (Lost.RANGE, "fit")])
def test_what_a_program_gave_up_on_is_a_loss(tracker: Tracker, state: Path, flag: Lost, why: str) -> None:
    with pins.locked():
        hooks = pins.Hooks(pins.directory_of(state))
    hooks.set_field(tracker.record.slot, Slot.LOST, int(flag))
    hooks.close()
    is_lost_for_good(tracker, state, why)


def test_distrust_lasts(tracker: Tracker, state: Path) -> None:
    tracker.distrust("a verify found a difference")
    is_lost_for_good(tracker, state, "a verify found a difference")


def test_a_restart_of_the_machine_is_a_loss_unless_it_is_resumed(tracker: Tracker, state: Path) -> None:
    path = state / "live" / tracker.identity.name / "device.json"
    path.write_text(path.read_text().replace(tracker.record.boot, "00000000-0000-0000-0000-000000000000"))
    is_lost_for_good(reopened(tracker, state), state, "restarted")


# -- errors -------------------------------------------------------------------------------------------


def test_one_command_at_a_time(tracker: Tracker, state: Path) -> None:
    with pytest.raises(BusyError, match="in use by another command"):
        Tracker.open(tracker.identity.name, state)
    with pytest.raises(BusyError, match="in use by another command"):
        tracking.stop(tracker.identity.name, state)


def test_starting_twice_is_refused_and_harms_nothing(node: str, state: Path) -> None:
    tracking.start(node, state).close()
    with pytest.raises(BusyError, match="tracked already"):
        tracking.start(node, state)
    write(node, 3)
    with Tracker.open(node, state) as tracker:
        assert tracker.changed_since(tracker.mark) == [(3 * BLOCK, BLOCK)]


def test_two_state_directories_track_one_device_apart(node: str, state: Path, tmp_path: Path) -> None:
    with state_directory(tmp_path / "other") as other:
        with tracking.start(node, state) as one, tracking.start(node, other) as two:
            write(node, 6)
            assert one.turn() == two.turn() == [(6 * BLOCK, BLOCK)]
        tracking.stop(node, other)
        write(node, 7)
        with Tracker.open(node, state) as one:
            assert one.turn() == [(7 * BLOCK, BLOCK)]


def test_what_cannot_be_tracked_is_named(tmp_path: Path, own_state: Path, node: str) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    with pytest.raises(UsageError, match="no block device"):
        tracking.start(str(plain), own_state)
    with pytest.raises(NotFoundError, match="no device"):
        tracking.start("/dev/nothing-here", own_state)
    with pytest.raises(UsageError, match="block"):
        tracking.start(node, own_state, block_size=1000)
    with pytest.raises(NotFoundError, match="not tracked"):
        Tracker.open(node, own_state)
    assert tracking.tracked(own_state) == []
    assert not pins.directory_of(own_state).exists()


def test_a_kernel_without_types_is_refused_with_a_hint(node: str, own_state: Path, monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:
    monkeypatch.setattr("stasis.linux.btf.VMLINUX", tmp_path / "vmlinux")
    with pytest.raises(UnsupportedError, match="does not describe its types") as caught:
        tracking.start(node, own_state)
    assert "CONFIG_DEBUG_INFO_BTF" in caught.value.hint
    assert tracking.tracked(own_state) == []


def test_a_damaged_record_says_which_file(tracker: Tracker, state: Path) -> None:
    (state / "live" / tracker.identity.name / "device.json").write_text("{")
    with pytest.raises(StateError, match=r"device\.json"):
        tracking.inspect(tracker.identity.name, state)
    tracker.close()
    tracking.stop(tracker.identity.name, state)


def test_the_map_is_the_format_of_served_devices(tracker: Tracker, state: Path) -> None:
    write(tracker.identity.path, 1)
    tracker.turn()
    data = (state / "live" / tracker.identity.name / "map").read_bytes()
    assert data[:8] == mapformat.MAGIC
    assert data[mapformat.HEADER_SIZE : mapformat.HEADER_SIZE + 3] == b"\0\1\0"
