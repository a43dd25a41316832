# SPDX-License-Identifier: Apache-2.0
"""A copy holds what the image holds, says what it cannot promise, and goes on where it was stopped."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.block.copy import CopyIdentity, CopyOptions, copy_image, plan
from stasis.block.copy.plan import Extent
from stasis.errors import (
    BusyError,
    ExitCode,
    GenerationError,
    NotFoundError,
    StateError,
    StorageError,
    UsageError,
    VerifyError,
)
from stasis.linux import files
from stasis.linux.iobuffer import IoBuffer

BLOCK = 64 * 1024
SMALL = CopyOptions(window_size=4 * BLOCK, sample_seed=7, checkpoint_seconds=0.0)
DEAD = OSError(errno.EIO, "dead")
WHOLE = CopyIdentity(snapshot="5e1f", device="sda", generation="9d03", change_number=4)
SINCE_3 = CopyIdentity(snapshot="5e1f", device="sda", generation="9d03", change_number=4, since=3)


class MemorySource:
    """An image in memory, with a hook that runs before every read."""

    def __init__(self, data: bytes, zeroes: list[Extent], before_read: Callable[[int], None]) -> None:
        self.size = len(data)
        self._data = data
        self._zeroes = zeroes
        self._before_read = before_read

    def read(self, extents: Sequence[Extent], buffer: IoBuffer) -> None:
        position = 0
        for offset, length in extents:
            self._before_read(offset)
            buffer.view[position : position + length] = self._data[offset : offset + length]
            position += length

    def zero_extents(self) -> list[Extent]:
        return self._zeroes

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def opener(
    data: bytes, zeroes: list[Extent] | None = None, before_read: Callable[[int], None] = lambda offset: None
) -> Callable[[], MemorySource]:
    return lambda: MemorySource(data, zeroes or [], before_read)


def image(blocks: int, tail: int = 0) -> bytes:
    return b"".join(bytes([1 + number % 250]) * BLOCK for number in range(blocks)) + b"\xfe" * tail


def sidecar_of(target: Path) -> Path:
    return target.with_name(target.name + ".stasis-copy")


def data_in(path: Path) -> list[Extent]:
    with open(path, "rb") as file:
        extents = files.data_extents(file.fileno(), 0, path.stat().st_size)
        return [(offset, length) for offset, length, is_data in extents if is_data]


def fail_at(limit: int, error: BaseException) -> Callable[[int], None]:
    def before_read(offset: int) -> None:
        if offset >= limit:
            raise error

    return before_read


# ---- extents


extents = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=20)


def covered(pieces: Sequence[Extent]) -> set[int]:
    return {byte for offset, length in pieces for byte in range(offset, offset + length)}


@given(extents)
def test_merged_extents_cover_the_same_bytes_and_do_not_touch(pieces: list[Extent]) -> None:
    merged = plan.merge(pieces)
    assert covered(merged) == covered(pieces)
    assert all(a + b < c for (a, b), (c, _) in itertools.pairwise(merged))


@given(extents, st.integers(0, 240))
def test_an_extent_list_and_its_complement_share_nothing_and_leave_nothing(pieces: list[Extent], size: int) -> None:
    merged = plan.merge(pieces)
    rest = plan.complement(merged, size)
    assert covered(rest) == set(range(size)) - covered(merged)
    assert plan.total(rest) == len(covered(rest))


@given(extents, extents, st.integers(1, 50), st.integers(1, 5))
def test_windows_cover_what_is_wanted_once_ascending_and_bounded(
    wanted: list[Extent], zeroes: list[Extent], window_size: int, max_extents: int
) -> None:
    wanted, zeroes = plan.merge(wanted), plan.merge(zeroes)
    made = list(plan.windows(plan.split_by_allocation(wanted, zeroes), window_size, max_extents))
    reads = [extent for window in made for extent in window.reads]
    zeroed = [extent for window in made for extent in window.zeroes]
    assert covered(reads) == covered(wanted) - covered(zeroes)
    assert covered(zeroed) == covered(wanted) & covered(zeroes)
    assert plan.total(reads) + plan.total(zeroed) == plan.total(wanted)
    assert all(window.read_bytes <= window_size for window in made)
    assert all(1 <= len(window.reads) + len(window.zeroes) <= max_extents for window in made)
    last = 0
    for window in made:
        assert all(last <= offset and offset + length <= window.end for offset, length in window.reads + window.zeroes)
        last = window.end


@given(extents, st.integers(1, 16), st.floats(0.001, 1), st.integers(0, 99))
def test_a_sample_is_of_distinct_blocks_of_the_extents_and_drawn_again_by_its_seed(
    pieces: list[Extent], block: int, share: float, seed: int
) -> None:
    merged = plan.merge(pieces)
    sample = plan.sample_blocks(merged, block, share, 3, seed)
    available = sum(-(-length // block) for _, length in merged)
    assert len(set(sample)) == len(sample) == min(available, max(3, round(available * share)))
    assert covered(sample) <= covered(merged)
    assert sample == plan.sample_blocks(merged, block, share, 3, seed)


# ---- whole copies


@given(
    st.lists(st.sampled_from(["data", "zero", "hole"]), max_size=12),
    st.integers(0, 5000),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_whole_copy_is_the_image(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], tail: int, connections: int, exists: bool
) -> None:
    data = b"".join(b"\x55" * BLOCK if kind == "data" else bytes(BLOCK) for kind in kinds) + b"\x77" * tail
    zeroes = plan.merge((i * BLOCK, BLOCK) for i, kind in enumerate(kinds) if kind == "hole")
    target = tmp_path_factory.mktemp("copy") / "t"
    if exists:
        target.write_bytes(b"\xee" * (BLOCK * 7 + 3))
    options = CopyOptions(window_size=3 * BLOCK, connections=connections, verify=True)
    result = copy_image(opener(data, zeroes), target, WHOLE, options=options)
    assert target.read_bytes() == data
    assert result.bytes_copied + result.bytes_zeroed == result.image_size == len(data)
    assert result.bytes_verified == len(data)
    assert not sidecar_of(target).exists()


def test_zeroes_of_the_image_take_no_space_in_the_target(tmp_path: Path) -> None:
    data = bytes(BLOCK * 40) + b"\1" * BLOCK + bytes(BLOCK * 40)
    result = copy_image(opener(data, [(0, BLOCK * 40)]), tmp_path / "t", WHOLE)
    assert data_in(tmp_path / "t") == [(BLOCK * 40, BLOCK)]
    assert (result.bytes_copied, result.bytes_zeroed) == (BLOCK, BLOCK * 80)


def test_a_new_target_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    copy_image(opener(image(1)), tmp_path / "t", WHOLE)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o600


def test_progress_ends_at_the_total_and_never_goes_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = CopyOptions(window_size=BLOCK, verify=True)
    copy_image(
        opener(image(9)),
        tmp_path / "t",
        WHOLE,
        options=options,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (18 * BLOCK, 18 * BLOCK)


# ---- incremental copies


def changed_image(base: bytes, blocks: Sequence[int]) -> tuple[bytes, list[Extent]]:
    data = bytearray(base)
    for block in blocks:
        data[block * BLOCK : (block + 1) * BLOCK] = bytes([255 - block]) * BLOCK
    return bytes(data), plan.merge((block * BLOCK, BLOCK) for block in blocks)


def test_an_incremental_copy_writes_the_changed_blocks_only(tmp_path: Path) -> None:
    target = tmp_path / "t"
    copy_image(opener(image(50, tail=10)), target, CopyIdentity("0", "sda", "9d03", 3))
    data, changed = changed_image(image(50, tail=10), [0, 7, 8, 49])
    reads: set[int] = set()
    options = CopyOptions(sample_share=0, verify=True)
    source = opener(data, before_read=reads.add)
    result = copy_image(source, target, SINCE_3, changed=changed, options=options)
    assert target.read_bytes() == data
    assert result.bytes_copied == result.bytes_verified == 4 * BLOCK
    assert reads == {0, 7 * BLOCK, 49 * BLOCK}


def test_changed_blocks_that_became_holes_become_holes_in_the_target(tmp_path: Path) -> None:
    target = tmp_path / "t"
    copy_image(opener(image(8)), target, CopyIdentity("0", "sda", "9d03", 3))
    data = image(2) + bytes(2 * BLOCK) + image(8)[4 * BLOCK :]
    hole = [(2 * BLOCK, 2 * BLOCK)]
    copy_image(opener(data, hole), target, SINCE_3, changed=hole, options=SMALL)
    assert target.read_bytes() == data
    assert data_in(target) == [(0, 2 * BLOCK), (4 * BLOCK, 4 * BLOCK)]


def test_a_missed_change_stops_the_copy_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "t"
    base = image(30)
    target.write_bytes(base)
    data, changed = changed_image(base, [3, 20])
    options = CopyOptions(sample_share=1.0, sample_seed=11)
    with pytest.raises(VerifyError) as caught:
        copy_image(opener(data), target, SINCE_3, changed=changed[:1], options=options)
    assert f"offset {20 * BLOCK}" in caught.value.message
    assert "seed 11" in caught.value.message
    assert caught.value.exit_code == ExitCode.VERIFY
    assert target.read_bytes() == base
    assert not sidecar_of(target).exists()


def test_a_hole_of_the_image_where_the_target_has_data_is_found_by_the_sample(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.write_bytes(bytes(BLOCK) + b"\0\0\0\1" + bytes(BLOCK - 4))
    options = CopyOptions(sample_share=1.0)
    with pytest.raises(VerifyError, match=f"offset {BLOCK + 3}:"):
        copy_image(opener(bytes(2 * BLOCK), [(0, 2 * BLOCK)]), target, SINCE_3, changed=[], options=options)


def test_the_sample_takes_at_least_some_blocks(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(image(100))
    result = copy_image(opener(image(100)), tmp_path / "t", SINCE_3, changed=[(0, BLOCK)])
    assert result.blocks_sampled == 16


def test_another_generation_is_refused_by_name(tmp_path: Path) -> None:
    options = CopyOptions(expected_generation="0bad")
    with pytest.raises(GenerationError, match="9d03, not of 0bad") as caught:
        copy_image(opener(image(1)), tmp_path / "t", SINCE_3, changed=[], options=options)
    assert caught.value.exit_code == ExitCode.GENERATION


@pytest.mark.parametrize(
    ("base", "error", "words"),
    [
        (CopyIdentity("0", "sda", "0bad", 3), GenerationError, "generation 0bad"),
        (CopyIdentity("0", "sda", "9d03", 2), GenerationError, "change number 2"),
        (CopyIdentity("0", "sdb", "9d03", 3), StateError, "holds device sdb"),
    ],
)
def test_a_target_that_is_noted_to_hold_another_state_is_refused(
    tmp_path: Path, base: CopyIdentity, error: type[Exception], words: str
) -> None:
    target = tmp_path / "t"
    copy_image(opener(image(2)), target, base)
    if "user.stasis.copy" not in os.listxattr(target):
        pytest.skip("this file system keeps no extended attributes")
    with pytest.raises(error, match=words):
        copy_image(opener(image(2)), target, SINCE_3, changed=[(0, BLOCK)])


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(image(2))
    with pytest.raises(StateError, match="no copy of it"):
        copy_image(opener(image(3)), tmp_path / "t", SINCE_3, changed=[])


def test_an_incremental_copy_makes_no_target(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        copy_image(opener(image(1)), tmp_path / "t", SINCE_3, changed=[])
    assert not list(tmp_path.iterdir())


# ---- stopping and going on


@pytest.mark.parametrize("error", [DEAD, KeyboardInterrupt()])
def test_a_stopped_copy_goes_on_without_reading_again_what_is_durable(tmp_path: Path, error: BaseException) -> None:
    target, data = tmp_path / "t", image(40, tail=100)
    stopped = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(stopped):
        copy_image(opener(data, before_read=fail_at(20 * BLOCK, error)), target, WHOLE, options=SMALL)
    position = json.loads(sidecar_of(target).read_text())["position"]
    assert 0 < position <= 20 * BLOCK
    reads: list[int] = []
    result = copy_image(opener(data, before_read=reads.append), target, WHOLE, options=SMALL)
    assert target.read_bytes() == data
    assert min(reads) == result.position_at_start == position
    assert not sidecar_of(target).exists()


def test_an_interrupt_from_the_progress_function_leaves_a_resumable_copy(tmp_path: Path) -> None:
    target, data, gate = tmp_path / "t", image(40), threading.Event()

    def interrupt(done: int, total: int) -> None:
        if done:
            gate.set()
            raise KeyboardInterrupt

    def wait_at_half(offset: int) -> None:
        if offset >= 20 * BLOCK:
            gate.wait(30)

    with pytest.raises(KeyboardInterrupt):
        copy_image(opener(data, before_read=wait_at_half), target, WHOLE, options=SMALL, progress=interrupt)
    assert json.loads(sidecar_of(target).read_text())["position"] > 0
    copy_image(opener(data), target, WHOLE, options=SMALL)
    assert target.read_bytes() == data


def test_an_unfinished_copy_of_something_else_is_not_continued(tmp_path: Path) -> None:
    target, other = tmp_path / "t", CopyIdentity("ffff", "sda", "9d03", 5)
    with pytest.raises(StorageError):
        copy_image(opener(image(9), before_read=fail_at(0, DEAD)), target, WHOLE)
    with pytest.raises(StateError, match="snapshot 5e1f") as caught:
        copy_image(opener(image(9)), target, other)
    assert str(sidecar_of(target)) in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"position": "x"}', '{"position": 5}'])
def test_a_damaged_record_is_not_trusted(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_bytes(b"x")
    sidecar_of(tmp_path / "t").write_text(text)
    with pytest.raises(StateError, match="unfinished copy"):
        copy_image(opener(image(1)), tmp_path / "t", WHOLE)


def test_a_record_without_its_target_starts_from_the_beginning(tmp_path: Path) -> None:
    target, data = tmp_path / "t", image(40)
    with pytest.raises(StorageError):
        copy_image(opener(data, before_read=fail_at(20 * BLOCK, DEAD)), target, WHOLE, options=SMALL)
    target.unlink()
    copy_image(opener(data), target, WHOLE, options=SMALL)
    assert target.read_bytes() == data


def test_a_read_back_that_differs_is_an_error_and_the_next_run_copies_all(tmp_path: Path) -> None:
    target, data = tmp_path / "t", image(6)
    calls: list[int] = []

    def damage_after_copy(offset: int) -> None:
        calls.append(offset)
        if len(calls) == 7:
            with open(target, "r+b") as file:
                file.seek(5 * BLOCK + 17)
                file.write(b"!")

    options = CopyOptions(window_size=BLOCK, connections=1, verify=True)
    with pytest.raises(VerifyError, match=f"offset {5 * BLOCK + 17}:"):
        copy_image(opener(data, before_read=damage_after_copy), target, WHOLE, options=options)
    assert json.loads(sidecar_of(target).read_text())["position"] == 0
    copy_image(opener(data), target, WHOLE, options=options)
    assert target.read_bytes() == data


def test_no_thread_and_no_descriptor_is_left(tmp_path: Path) -> None:
    copy_image(opener(image(3)), tmp_path / "t", WHOLE)
    before = len(os.listdir("/proc/self/fd"))
    for error in (DEAD, KeyboardInterrupt()):
        with pytest.raises((StorageError, KeyboardInterrupt)):
            copy_image(opener(image(3), before_read=fail_at(0, error)), tmp_path / "t", WHOLE)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copy-")]


# ---- targets that are refused


def test_the_origin_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "origin").write_bytes(image(1))
    (tmp_path / "link").symlink_to(tmp_path / "origin")
    with pytest.raises(UsageError, match="origin"):
        copy_image(opener(image(1)), tmp_path / "link", WHOLE, options=CopyOptions(never=tmp_path / "origin"))
    assert (tmp_path / "origin").read_bytes() == image(1)


def test_a_target_that_another_copy_writes_is_busy(tmp_path: Path) -> None:
    with open(tmp_path / "t", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            copy_image(opener(image(1)), tmp_path / "t", WHOLE)


@pytest.mark.parametrize(("name", "error"), [("", UsageError), ("none/t", NotFoundError), ("pipe", UsageError)])
def test_a_target_of_the_wrong_kind_is_refused(tmp_path: Path, name: str, error: type[Exception]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error):
        copy_image(opener(image(1)), tmp_path / name, WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_device_that_is_not_there_does_not_become_a_file_of_its_name() -> None:
    """It would lie in memory, and whoever mistyped the name would think that a disk was written."""
    target = Path("/dev/no-such-device-of-stasis")
    with pytest.raises(NotFoundError, match="there is no device"):
        copy_image(opener(image(1)), target, WHOLE)
    assert not target.exists()


def test_changed_extents_and_their_number_come_together(tmp_path: Path) -> None:
    for identity, changed in ((WHOLE, [(0, 1)]), (SINCE_3, None)):
        with pytest.raises(UsageError):
            copy_image(opener(image(1)), tmp_path / "t", identity, changed=changed)
