# SPDX-License-Identifier: Apache-2.0
"""Applying a later backup to a restored image: only what changed is copied, and only onto what it changed from."""

from __future__ import annotations

import errno
import itertools
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.repo import ZERO, Index, Manifest, Repository
from stasis.backup.restore import ApplyOptions, RestoreOptions, apply, restore
from stasis.backup.restore.batches import BATCH_SPAN, Entry, all_entries, batches, changed_entries
from stasis.errors import NotFoundError, StateError, StorageError, UsageError, VerifyError
from tests.backup.restoring import CHUNK, image, new_repository, objects, publish, sidecar_of, stopping_after

OFTEN = ApplyOptions(checkpoint_seconds=0)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with new_repository(tmp_path / "repository") as made:
        yield made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def changed(data: bytes, *chunks: int) -> bytes:
    """The same but for a byte in the middle of each of these chunks."""
    new = bytearray(data)
    for chunk in chunks:
        new[chunk * CHUNK + CHUNK // 2] ^= 0xFF
    return bytes(new)


def restored(repository: Repository, data: bytes, target: Path) -> Manifest:
    manifest = publish(repository, data)
    restore(repository, manifest, target)
    return manifest


def stop_once(repository: Repository, manifest: Manifest, target: Path, base: Manifest | None = None) -> None:
    """An apply that fails half-way."""
    with pytest.MonkeyPatch.context() as patch, stopping_after(patch, 20, OSError(errno.EIO, "broken")):
        patch.setattr(Repository, "parallelism", 1)
        with pytest.raises(StorageError):
            apply(repository, manifest, target, base=base, options=OFTEN)
    assert sidecar_of(target).exists()


# ---- what is written


@given(
    sizes=st.tuples(st.integers(0, 5 * CHUNK), st.integers(0, 5 * CHUNK)),
    seeds=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    verify=st.booleans(),
)
@settings(max_examples=15)
def test_any_backup_can_be_applied_to_any_other(
    sizes: tuple[int, int], seeds: tuple[int, int], verify: bool
) -> None:
    old, new = (image(size, seed) for size, seed in zip(sizes, seeds, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "target")
        with new_repository(Path(folder, "repository")) as repository:
            restored(repository, old, target)
            apply(repository, publish(repository, new), target, options=ApplyOptions(verify=verify))
            assert target.read_bytes() == new
            apply(repository, publish(repository, old), target)  # it is noted what the target holds now
        assert target.read_bytes() == old


def test_only_what_changed_is_fetched_and_written(repository: Repository, target: Path) -> None:
    data = random.Random(1).randbytes(50 * CHUNK + 9)
    base = restored(repository, data, target)
    new = publish(repository, changed(data, 3, 4, 40))
    kept = {repository.index(new).name(number).hex() for number in (3, 4, 40)}
    for chunk in objects(repository, "chunks"):
        if chunk.name not in kept:
            chunk.unlink()
    result = apply(repository, new, target, base=base, options=ApplyOptions(verify=True))
    assert (result.chunks_fetched, result.bytes_written, result.bytes_verified) == (3, 3 * 4096, 3 * CHUNK)
    assert result.chunks_sampled >= 16
    assert target.read_bytes() == changed(data, 3, 4, 40)


def test_equal_segments_of_two_indexes_are_not_read(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    per_segment = 4096
    builders = [repository.index_builder(3 * per_segment * CHUNK) for _ in range(2)]
    for builder in builders:
        for number in range(3 * per_segment):
            builder.set(number, bytes([1]) * 32)
    builders[1].set(2 * per_segment - 1, b"n" * 32)
    old, new = (repository.index(_with_segments(repository, builder.finish())) for builder in builders)
    read: list[int] = []
    segment = type(new).segment

    def counted(self: object, number: int) -> bytes:
        read.append(number)
        return segment(new if self is new else old, number)

    monkeypatch.setattr(type(new), "segment", counted)
    assert list(changed_entries(old, new)) == [Entry(2 * per_segment - 1, b"n" * 32, bytes([1]) * 32)]
    assert set(read) == {1}


def _with_segments(repository: Repository, segments: tuple[bytes, ...]) -> Manifest:
    size = 3 * 4096 * CHUNK
    return Manifest(set_id="", host="", device="", path="", source_kind="", device_identity="", size=size,
                    chunk_size=CHUNK, time="", kind="full", segments=tuple(name.hex() for name in segments))


@given(st.lists(st.sampled_from([bytes(32), b"a" * 32, b"b" * 32]), max_size=300), st.integers(1, CHUNK))
def test_batches_cover_the_entries_in_order(names: list[bytes], tail: int) -> None:
    size = max(0, len(names) - 1) * CHUNK + (tail if names else 0)
    index = Index(size, CHUNK, [b"s" * 32] if names else [], lambda name, length: b"".join(names))
    found = list(batches(all_entries(index), size, CHUNK))
    assert sum(batch.length for batch in found) == size
    assert [batch.end for batch in found] == sorted({batch.end for batch in found})
    covered = sorted((offset, length) for batch in found
                     for offset, length in [*batch.zeroes, *((c.offset, c.length) for c in batch.chunks)])
    assert all(sum(one) == two[0] for one, two in itertools.pairwise(covered))
    assert all(batch.chunk_bytes <= 1 << 20 for batch in found)
    stored = [chunk for batch in found for chunk in batch.chunks]
    assert [chunk.name for chunk in stored] == [name for name in names if name != ZERO]
    assert all(names[chunk.offset // CHUNK] == chunk.name for chunk in stored)


def test_a_long_run_of_zeroes_is_cut_to_batches_that_end_soon() -> None:
    index = Index(3 << 30, CHUNK, [ZERO] * 12, lambda name, length: b"")
    found = list(batches(all_entries(index, 100), 3 << 30, CHUNK))
    assert sum(batch.length for batch in found) == (3 << 30) - 100 * CHUNK
    assert max(batch.length for batch in found) <= 2 * BATCH_SPAN
    assert len(found) < 30


# ---- stopping and going on


@pytest.mark.parametrize("named", [False, True])
def test_a_stopped_apply_goes_on(repository: Repository, target: Path, named: bool) -> None:
    data = random.Random(2).randbytes(64 * CHUNK)
    base = restored(repository, data, target)
    new = publish(repository, changed(data, *range(0, 64, 2)))
    stop_once(repository, new, target, base if named else None)
    result = apply(repository, new, target)
    assert result.position_at_start > 0
    assert target.read_bytes() == changed(data, *range(0, 64, 2))
    assert not sidecar_of(target).exists()


def test_an_unfinished_apply_is_no_base_for_another(repository: Repository, target: Path) -> None:
    data = random.Random(3).randbytes(64 * CHUNK)
    restored(repository, data, target)
    new = publish(repository, changed(data, *range(64)))
    later = publish(repository, changed(data, 1))
    stop_once(repository, new, target)
    with pytest.raises(StateError):
        apply(repository, later, target)
    with pytest.raises(StateError, match="unfinished"):
        apply(repository, later, target, base=new)
    restore(repository, later, target, RestoreOptions(in_place=True, overwrite=True))
    assert target.read_bytes() == changed(data, 1)


# ---- refusals


def refused(
    repository: Repository, manifest: Manifest, target: Path, error: type[Exception], words: str,
    base: Manifest | None = None, options: ApplyOptions | None = None,
) -> None:  # fmt: skip
    before = target.read_bytes()
    with pytest.raises(error, match=words):
        apply(repository, manifest, target, base=base, options=options)
    assert target.read_bytes() == before
    assert not sidecar_of(target).exists()


def test_a_file_that_was_never_restored_is_refused(repository: Repository, target: Path) -> None:
    target.write_bytes(image(9 * CHUNK))
    refused(repository, publish(repository, image(9 * CHUNK, 2)), target, StateError, "not noted to hold")


def test_a_target_of_another_backup_is_refused(repository: Repository, target: Path) -> None:
    restored(repository, image(9 * CHUNK), target)
    other = publish(repository, image(9 * CHUNK, 2))
    refused(repository, publish(repository, image(9 * CHUNK, 3)), target, StateError, "not " + other.id[:12], other)


def test_a_target_that_was_written_to_is_refused(repository: Repository, target: Path) -> None:
    data = image(9 * CHUNK)
    restored(repository, data, target)
    os.utime(target)
    refused(repository, publish(repository, changed(data, 2)), target, StateError, "written to since")


def test_a_target_that_differs_from_the_base_is_found_by_the_sample(repository: Repository, target: Path) -> None:
    data = random.Random(4).randbytes(60 * CHUNK)
    base = publish(repository, data)
    target.write_bytes(changed(data, 30))
    options = ApplyOptions(sample_share=1, sample_seed=7)
    refused(repository, publish(repository, changed(data, 2)), target, VerifyError, f"offset {30 * CHUNK}.* seed 7",
            base, options)  # fmt: skip


def test_a_target_that_differs_where_it_changed_is_found_in_any_case(repository: Repository, target: Path) -> None:
    data = random.Random(5).randbytes(60 * CHUNK)
    base = publish(repository, data)
    target.write_bytes(changed(data, 30))
    new = publish(repository, bytes(data[: 30 * CHUNK]) + b"n" * CHUNK + data[31 * CHUNK :])
    with pytest.raises(VerifyError, match="no faithful restore"):
        apply(repository, new, target, base=base, options=ApplyOptions(sample_share=0))
    assert target.read_bytes() == changed(data, 30)
    assert sidecar_of(target).exists()


def test_a_base_of_another_size_is_refused(repository: Repository, target: Path) -> None:
    target.write_bytes(image(9 * CHUNK))
    base, new = publish(repository, image(8 * CHUNK)), publish(repository, image(9 * CHUNK))
    refused(repository, new, target, StateError, f"has {9 * CHUNK} bytes", base)


def test_a_base_that_was_forgotten_is_named(repository: Repository, target: Path) -> None:
    base = restored(repository, image(9 * CHUNK), target)
    repository.remove_backup(base.id)
    refused(repository, publish(repository, image(9 * CHUNK, 2)), target, NotFoundError, base.id[:12])


def test_a_restore_from_another_repository_is_refused(repository: Repository, target: Path, tmp_path: Path) -> None:
    restored(repository, image(9 * CHUNK), target)
    with new_repository(tmp_path / "other") as other:
        refused(other, publish(other, image(9 * CHUNK)), target, StateError, "another repository")


def test_an_apply_makes_no_target(repository: Repository, target: Path) -> None:
    with pytest.raises(NotFoundError):
        apply(repository, publish(repository, b"x"), target)
    assert not target.exists()


def test_backups_of_two_chunk_sizes_do_not_mix(repository: Repository, target: Path) -> None:
    target.write_bytes(image(4 * CHUNK))
    base = publish(repository, image(4 * CHUNK))
    repository.chunk_size = 2 * CHUNK
    refused(repository, publish(repository, image(4 * CHUNK, 2)), target, UsageError, "chunk size", base)
