# SPDX-License-Identifier: Apache-2.0
"""Verifying: damage is named, all of it; and a live device is compared as far as it has not changed since."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.restore import verify, verify_live
from stasis.backup.sources import RawSource, StreamSource
from stasis.block.copy import plan
from stasis.errors import DamagedError, ExitCode, StasisError, UsageError
from stasis.linux.iobuffer import PAGE_SIZE
from tests.backup.restoring import CHUNK, image, new_repository, objects, publish
from tests.backup.tracked import BLOCK, FakeDisk, FakeSnapshot

SIZE = 6 * CHUNK + 100


@pytest.fixture(scope="module")
def module_repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with new_repository(tmp_path_factory.mktemp("verify") / "repository") as made:
        yield made


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with new_repository(tmp_path / "repository") as made:
        yield made


def backed_up(repository: Repository, disk: FakeDisk) -> Manifest:
    mark = disk.snapshot().mark
    assert mark is not None
    return publish(repository, bytes(disk.data), generation=mark.generation, change_number=mark.number)


# ---- by digest


def test_a_sound_backup_is_read_once(repository: Repository) -> None:
    once = image(20 * CHUNK)
    result = verify(repository, publish(repository, once * 3))
    chunks = {once[at : at + CHUNK] for at in range(0, len(once), CHUNK)} - {bytes(CHUNK)}
    assert (result.bytes_checked, result.size) == (len(chunks) * CHUNK, len(once) * 3)


def test_every_damaged_chunk_is_told(repository: Repository) -> None:
    manifest = publish(repository, random.Random(1).randbytes(20 * CHUNK))
    spoiled = objects(repository, "chunks")[3:6]
    for chunk in spoiled:
        chunk.chmod(0o600)
    spoiled[0].unlink()
    spoiled[1].write_bytes(spoiled[1].read_bytes()[:-9])
    spoiled[2].write_bytes(spoiled[2].read_bytes().swapcase())
    told: list[StasisError] = []
    with pytest.raises(DamagedError, match="first of 3 damaged chunks") as caught:
        verify(repository, manifest, Progress(on_error=told.append))
    assert manifest.id[:12] in caught.value.message
    assert caught.value.exit_code == ExitCode.DAMAGED
    named = {chunk.name for chunk in spoiled if any(chunk.name in error.message for error in told)}
    assert (len(told), named) == (3, {chunk.name for chunk in spoiled})


def test_a_missing_segment_is_named(repository: Repository) -> None:
    manifest = publish(repository, image(3 * CHUNK))
    (segment,) = objects(repository, "segments")
    segment.unlink()
    with pytest.raises(DamagedError, match=segment.name):
        verify(repository, manifest)


# ---- against a live device


@given(
    tracked=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)), max_size=4),
    behind=st.lists(st.integers(0, SIZE - 1), max_size=3),
    read_data=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=20)
def test_what_changed_behind_the_back_of_tracking_is_found_to_the_page(
    module_repository: Repository, tracked: list[tuple[int, int]], behind: list[int], read_data: bool, seed: int
) -> None:
    disk = FakeDisk(image(SIZE, seed))
    manifest = backed_up(module_repository, disk)
    for offset, length in tracked:
        disk.write(offset, b"t" * min(length, SIZE - offset))
    changed = plan.merge((at * BLOCK, min(BLOCK, SIZE - at * BLOCK)) for at, number in enumerate(disk.changes)
                         if number > (manifest.change_number or 0))  # fmt: skip
    for offset in behind:
        disk.write(offset, bytes([disk.data[offset] ^ 0x55]), seen=False)
    result = verify_live(module_repository, manifest, disk.snapshot(), read_data=read_data)
    assert BLOCK == PAGE_SIZE
    odd = {offset for offset in behind if behind.count(offset) % 2}
    pages = plan.merge((at // BLOCK * BLOCK, min(BLOCK, SIZE - at // BLOCK * BLOCK)) for at in odd)
    expected = [extent for gap in plan.complement(changed, SIZE) for extent in plan.clip(pages, gap[0], sum(gap))]
    assert list(result.differing) == expected
    assert result.bytes_differing == plan.total(expected)
    assert result.bytes_left_out == plan.total(changed)
    assert result.bytes_compared + result.bytes_left_out == SIZE


def test_an_equal_device_needs_no_stored_data(repository: Repository) -> None:
    disk = FakeDisk(image(SIZE))
    manifest = backed_up(repository, disk)
    for chunk in objects(repository, "chunks"):
        chunk.unlink()
    result = verify_live(repository, manifest, disk.snapshot())
    assert (result.bytes_differing, result.bytes_checked, result.bytes_compared) == (0, 0, SIZE)
    with pytest.raises(DamagedError):
        verify_live(repository, manifest, disk.snapshot(), read_data=True)


def test_a_device_of_another_generation_is_compared_whole(repository: Repository) -> None:
    disk = FakeDisk(image(SIZE))
    manifest = backed_up(repository, disk)
    disk.write(0, b"new", seen=True)
    disk.new_generation()
    result = verify_live(repository, manifest, disk.snapshot())
    assert (result.differing, result.bytes_left_out) == (((0, BLOCK),), 0)


@pytest.mark.parametrize("size", [SIZE - 5000, SIZE + 5000, 0])
def test_a_file_of_another_size_differs(repository: Repository, tmp_path: Path, size: int) -> None:
    data = image(SIZE)
    manifest = publish(repository, data)
    (tmp_path / "disk").write_bytes((data + bytes(10_000))[:size])
    with RawSource("disk", str(tmp_path / "disk")) as source:
        result = verify_live(repository, manifest, source)
    assert result.differing == ((min(size, SIZE), abs(size - SIZE)),)


def test_known_zeroes_are_not_read(repository: Repository) -> None:
    disk = FakeDisk(bytes(5 * CHUNK) + b"x" * CHUNK)
    manifest = publish(repository, bytes(disk.data))
    source: FakeSnapshot = disk.snapshot()
    assert verify_live(repository, manifest, source).bytes_differing == 0
    assert plan.merge(source.reads) == [(5 * CHUNK, CHUNK)]
    assert source.readers == 0


def test_standard_input_is_no_origin(repository: Repository) -> None:
    with pytest.raises(UsageError, match="size is not known"):
        verify_live(repository, publish(repository, b"x"), StreamSource("dump", 0))
