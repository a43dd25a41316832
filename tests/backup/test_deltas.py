# SPDX-License-Identifier: Apache-2.0
"""Deltas: an incremental backup stores what was written, every backup still holds all of its disk, and no part that a
chunk is made of is ever lost, confused or returned when it is damaged."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.backup.job import CreateOptions, SampleOptions, create
from stasis.backup.job.parts import split_changes
from stasis.backup.keep.check import check
from stasis.backup.keep.copy import copy
from stasis.backup.keep.prune import prune
from stasis.backup.repo import Manifest, Repository, Secret, keys
from stasis.backup.repo.delta import (
    apply_extents,
    decode,
    decode_pack,
    encode,
    encode_pack,
    in_pack,
    is_delta,
    make_delta,
    objects_of,
    pack_name,
    place_of,
    with_bit,
    without_bit,
)
from stasis.backup.repo.index import ZERO, Index, IndexBuilder, is_whole
from stasis.backup.restore import RestoreOptions, apply, restore, verify
from stasis.block.copy.plan import clip, merge, total
from stasis.errors import DamagedError
from tests.backup.tracked import BLOCK, FakeDisk

CHUNK = 65536
SIZE = 6 * CHUNK + 3 * BLOCK + 512
SECRET = Secret(b"secret")
BASE = without_bit(bytes(range(32)))


@pytest.fixture(params=[None, SECRET], ids=["open", "encrypted"])
def repository(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    monkeypatch.setattr(keys, "SCRYPT_N", 16)
    compression = "none" if request.param is None else "zstd"
    with Repository.init(str(tmp_path / "repo"), secret=request.param, chunk_size=CHUNK,
                         compression=compression) as made:
        yield made


@pytest.fixture
def options(tmp_path: Path) -> CreateOptions:
    return CreateOptions(host="host", state_dir=tmp_path / "state", sample=SampleOptions(minimum=4))


@pytest.fixture
def disk(seed: int) -> FakeDisk:
    """Random, with a chunk of zeroes."""
    disk = FakeDisk(random.Random(seed).randbytes(SIZE))
    disk.data[2 * CHUNK : 3 * CHUNK] = bytes(CHUNK)
    return disk


class History:
    """Backups of a disk, each with what the disk held."""

    def __init__(self, disk: FakeDisk, repository: Repository, options: CreateOptions) -> None:
        self.disk, self.repository, self.options = disk, repository, options
        self.made: list[tuple[Manifest, bytes]] = []

    def back_up(self, *writes: tuple[int, int]) -> Manifest:
        """Write random data at (offset, length) and make a backup."""
        for offset, length in writes:
            self.disk.write(offset, random.randbytes(length))
        snapshot = self.disk.snapshot()
        (backup,) = create([snapshot], self.repository, self.options).backups
        self.made.append((backup, bytes(snapshot.data)))
        return backup

    def names(self, backup: Manifest) -> list[bytes]:
        return list(self.repository.index(backup).names())


@pytest.fixture
def history(disk: FakeDisk, repository: Repository, options: CreateOptions) -> History:
    """A full backup, and one with a delta, a chunk that was zeroes, and one that is stored whole again."""
    history = History(disk, repository, options)
    history.back_up()
    history.back_up((10, 20), (2 * CHUNK + BLOCK, 100), (4 * CHUNK, CHUNK), (6 * CHUNK, SIZE - 6 * CHUNK))
    return history


def restored(repository: Repository, backup: Manifest, path: Path) -> bytes:
    path.unlink(missing_ok=True)
    restore(repository, backup, path)
    return path.read_bytes()


def object_path(repository: Repository, name: bytes) -> Path:
    return Path(repository.store.url) / "chunks" / name.hex()[:2] / objects_of(name).hex()


# -- the object -------------------------------------------------------------------------------------------------------


@st.composite
def extents(draw: Any) -> list[tuple[int, int]]:
    """Extents in a chunk of 200 bytes."""
    return merge(draw(st.lists(st.tuples(st.integers(0, 199), st.integers(1, 30)), min_size=1, max_size=5)
                      .map(lambda found: [(at, min(length, 200 - at)) for at, length in found])))


@given(st.lists(extents(), min_size=1, max_size=4), st.binary(min_size=200, max_size=200), st.randoms())
def test_overlaid_deltas_are_what_writing_one_after_the_other_is(places: list[list[tuple[int, int]]], base: bytes,
                                                                 draw: random.Random) -> None:
    model, delta = bytearray(base), None
    for extents_ in places:
        data = memoryview(draw.randbytes(total(extents_)))
        apply_extents(extents_, data, memoryview(model))
        room = memoryview(bytearray(200))
        delta = make_delta(BASE, extents_, data) if delta is None else delta.overlaid(extents_, data, room)
    assert delta is not None
    chunk = bytearray(base)
    decode(encode(delta)).apply(memoryview(chunk))
    assert chunk == model
    assert (delta.base, list(delta.extents)) == (BASE, merge(place for extents_ in places for place in extents_))


@given(st.binary(max_size=120) | st.binary(max_size=60).map(lambda rest: BASE + b"\1\0\0\0" + rest))
def test_no_other_bytes_are_a_delta(content: bytes) -> None:
    try:
        delta = decode(content)
    except ValueError:
        return
    assert encode(delta) == content


@given(st.lists(extents(), min_size=1, max_size=5), st.randoms())
def test_a_pack_gives_back_its_deltas(places: list[list[tuple[int, int]]], draw: random.Random) -> None:
    deltas = [make_delta(BASE, one, memoryview(draw.randbytes(total(one)))) for one in places]
    packed = decode_pack(encode_pack(deltas))
    assert [(found.base, found.extents, bytes(found.data)) for found in map(decode, packed)] == [
        (delta.base, delta.extents, bytes(delta.data)) for delta in deltas]


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda rest: b"\2\0\0\0\5\0\0\0" + rest))
def test_no_other_bytes_are_a_pack(content: bytes) -> None:
    try:
        packed = decode_pack(content)
    except ValueError:
        return
    heads = b"".join(len(one).to_bytes(4, "little") for one in packed)
    assert len(packed).to_bytes(4, "little") + heads + b"".join(packed) == content


@given(st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.booleans(), st.integers(0, 4095)), max_size=5))
def test_names_tell_pack_and_place(drawn: list[tuple[bytes, bool, int]]) -> None:
    names = [in_pack(pack_name(digest), place) if delta else without_bit(digest) for digest, delta, place in drawn]
    wanted = [pack_name(digest) if delta else without_bit(digest) for digest, delta, _ in drawn]
    assert objects_of(b"".join(names)) == b"".join(wanted)
    assert [place_of(name) for name in names if is_delta(name)] == [place for _, delta, place in drawn if delta]


@pytest.mark.parametrize(("places", "data"), [
    ([], b""), ([(0, 0)], b""), ([(5, 1), (5, 1)], b"xy"), ([(5, 1), (0, 1)], b"xy"), ([(0, 2)], b"x"),
    ([(0, 1)], b"xy"),
])
def test_what_no_delta_can_be(places: list[tuple[int, int]], data: bytes) -> None:
    with pytest.raises(ValueError, match=r"extents|data"):
        make_delta(BASE, places, memoryview(data))


def test_a_delta_past_the_end_of_its_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="past the end"):
        make_delta(BASE, [(8, 8)], memoryview(bytes(8))).apply(memoryview(bytearray(15)))


@given(st.binary(min_size=32, max_size=32))
def test_one_bit_tells_deltas(digest: bytes) -> None:
    assert is_delta(with_bit(digest))
    assert not is_delta(without_bit(digest))
    assert digest in (with_bit(digest), without_bit(digest))


# -- what is read -----------------------------------------------------------------------------------------------------


class Names:
    """An index of three chunks and a short one; the second holds zeroes."""

    chunk_size, count = 100, 4

    def name(self, number: int) -> bytes:
        return ZERO if number == 1 else BASE

    def chunk_length(self, number: int) -> int:
        return 100 if number < 3 else 30


@given(st.lists(st.tuples(st.integers(0, 329), st.integers(1, 330)), max_size=6))
def test_every_changed_byte_is_read_and_little_else(changes: list[tuple[int, int]]) -> None:
    changed = merge((offset, min(length, 330 - offset)) for offset, length in changes)
    whole, parts = split_changes(changed, Names())  # type: ignore[arg-type]
    numbers = [number for first, count in whole for number in range(first, first + count)]
    assert sorted([*numbers, *(part.number for part in parts)]) == sorted(
        {byte // 100 for offset, length in changed for byte in range(offset, offset + length)})
    assert [part.number for part in parts] == sorted(part.number for part in parts)
    for part in parts:
        assert list(part.extents) == clip(changed, part.number * 100, part.number * 100 + 100)
        assert part.number == 1 or part.length <= Names().chunk_length(part.number) // 2


# -- backups ----------------------------------------------------------------------------------------------------------


def test_a_scattered_change_is_stored_as_a_delta_and_restored(history: History, tmp_path: Path) -> None:
    full, second = (history.names(backup) for backup, _ in history.made)
    assert [is_delta(name) for name in second] == [True, False, True, False, False, False, False]
    assert [a == b for a, b in zip(full, second, strict=True)] == [False, True, False, True, False, True, False]
    assert history.made[1][0].statistics["bytes_read"] == BLOCK + BLOCK + CHUNK + SIZE - 6 * CHUNK
    for backup, data in history.made:
        assert restored(history.repository, backup, tmp_path / "image") == data
        assert verify(history.repository, backup).bytes_checked > 0


def test_deltas_are_laid_over_deltas_then_made_one_and_end_as_a_whole_chunk(history: History, tmp_path: Path) -> None:
    names = [history.names(backup)[0] for backup, _ in history.made]
    for block in range(1, 9):
        backup = history.back_up((block * BLOCK, 5))
        names.append(history.names(backup)[0])
        below = history.repository.index(backup).chains(0).get(0, ())
        if block == 8:  # nine blocks of sixteen
            assert not is_delta(names[-1])
            assert below == ()
        elif block == 4:
            assert below == (names[0],)
        else:
            assert below[0] == names[-2]
            assert below[-1] == names[0]
            assert len(below) == block % 4 + 1
    for backup, data in history.made:
        assert restored(history.repository, backup, tmp_path / "image") == data


def test_only_small_deltas_are_laid_over_others(history: History, tmp_path: Path) -> None:
    for blocks, links in ((2, 2), (3, 1)):
        backup = history.back_up((CHUNK - blocks * BLOCK, blocks * BLOCK))
        assert len(history.repository.index(backup).chain(0)) == links
        assert restored(history.repository, backup, tmp_path / "image") == history.made[-1][1]


def test_what_was_zeroes_is_a_delta_over_nothing_and_zeroes_stay_nothing(history: History, tmp_path: Path) -> None:
    history.disk.write(2 * CHUNK, bytes(CHUNK))
    assert history.names(history.back_up())[2] == ZERO
    history.disk.write(2 * CHUNK + BLOCK, bytes(BLOCK))
    assert history.names(history.back_up())[2] == ZERO
    backup = history.back_up((2 * CHUNK, 10))
    assert history.repository.index(backup).chain(2) == (ZERO,)
    assert check(history.repository, read_share=1).problems == []
    assert restored(history.repository, backup, tmp_path / "image") == history.made[-1][1]


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4)),
                max_size=6))
def test_an_index_gives_back_its_chains(drawn: list[tuple[int, list[bytes]]]) -> None:
    saved: dict[bytes, bytes] = {}

    def save(content: bytes) -> bytes:
        saved[name := without_bit(b"%32d" % len(saved))] = content
        return name

    builder, model = IndexBuilder(6 * CHUNK, CHUNK, None, save), {}
    for number, names in drawn:
        chain = (*map(with_bit, names[:-1]), without_bit(names[-1]))
        builder.set(number, pack_name(names[0]), chain)
        model[number] = chain
    index = Index(6 * CHUNK, CHUNK, builder.finish(), lambda name, length: saved[name])
    assert dict(index.chains(0)) == model
    assert all(index.chain(number) == chain for number, chain in model.items())
    for content in saved.values():
        assert is_whole(content, 6 * 32)
        assert not is_whole(content[:-32], 6 * 32) or not model
        assert not is_whole(content + BASE, 6 * 32)
        assert not is_whole(content + with_bit(BASE), 6 * 32)


def test_a_base_stays_as_long_as_a_delta_needs_it(history: History, tmp_path: Path) -> None:
    history.repository.remove_backup(history.made[0][0].id)
    removed = prune(history.repository)
    assert removed.chunks_removed == 2  # those that were written over as a whole
    assert check(history.repository, read_share=1).problems == []
    backup, data = history.made[1]
    assert restored(history.repository, backup, tmp_path / "image") == data


@pytest.mark.parametrize("kind", ["delta", "base"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damage_to_a_delta_or_its_base_is_named_and_never_restored(history: History, tmp_path: Path, kind: str,
                                                                   how: str) -> None:
    repository, backup = history.repository, history.made[1][0]
    name = history.names(backup)[0] if kind == "delta" else history.names(history.made[0][0])[0]
    path = object_path(repository, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if how != "delete":
        path.write_bytes(content if how == "flip" else content[:-7])
    found = {problem.object: problem.backups for problem in check(repository, read_share=1).problems}
    name = objects_of(name)
    harmed = [backup.id] if kind == "delta" else [history.made[0][0].id, backup.id]
    assert {where: sorted(ids) for where, ids in found.items()} == {
        f"chunks/{name.hex()[:2]}/{name.hex()}": sorted(harmed)}
    with pytest.raises(DamagedError, match=name.hex()):
        restore(repository, backup, tmp_path / "image")
    buffer = memoryview(bytearray(b"x" * CHUNK))
    with pytest.raises(DamagedError):
        repository.chunk_reader().fetch(history.names(backup)[0], buffer)
    assert not any(buffer)


def test_a_delta_under_the_name_of_another_is_refused(history: History) -> None:
    repository, first = history.repository, history.names(history.made[1][0])[0]
    second = history.names(history.back_up((BLOCK, 9)))[0]
    object_path(repository, second).write_bytes(object_path(repository, first).read_bytes())
    with pytest.raises(DamagedError, match=objects_of(second).hex()):
        repository.chunk_reader().fetch(second, memoryview(bytearray(CHUNK)))


def test_a_place_that_the_pack_has_not_is_refused(history: History) -> None:
    name = history.names(history.made[1][0])[0]
    with pytest.raises(DamagedError, match="it has no delta 2"):
        history.repository.chunk_reader().fetch(in_pack(name, 2), memoryview(bytearray(CHUNK)))


def test_deltas_share_objects(history: History, tmp_path: Path) -> None:
    backup = history.back_up(*((number * CHUNK + 5 * BLOCK, 3 * BLOCK) for number in (0, 1, 3, 5)))
    before = history.names(history.made[1][0])
    deltas = [name for name in history.names(backup) if is_delta(name) and name not in before]
    assert [place_of(name) for name in deltas] == [0, 1, 2, 3]
    assert len({objects_of(name) for name in deltas}) == backup.statistics["chunks_new"] == 1
    history.repository.remove_backups([made.id for made, _ in history.made[:-1]])
    again = history.back_up((CHUNK, CHUNK), (3 * CHUNK, CHUNK))  # the pack is needed for two of its deltas yet
    history.repository.remove_backup(backup.id)
    prune(history.repository)
    assert check(history.repository, read_share=1).problems == []
    assert restored(history.repository, again, tmp_path / "image") == history.made[-1][1]


def test_a_pack_is_no_larger_than_a_chunk(history: History, tmp_path: Path) -> None:
    backup = history.back_up(*((number * CHUNK + 2 * BLOCK, 7 * BLOCK) for number in (1, 3, 4, 5)))
    assert backup.statistics["deltas"] == 4
    assert backup.statistics["chunks_new"] == 2
    assert check(history.repository, read_share=1).problems == []
    assert restored(history.repository, backup, tmp_path / "image") == history.made[-1][1]


def test_a_parent_whose_delta_is_damaged_makes_a_full_backup(history: History) -> None:
    object_path(history.repository, history.names(history.made[1][0])[0]).write_bytes(b"no object")
    backup = history.back_up((BLOCK, 3 * BLOCK))  # too much for another delta over it
    assert (backup.kind, "cannot be built upon" in backup.note) == ("full", True)


def test_copies_to_another_repository_hold_the_same(history: History, tmp_path: Path) -> None:
    with Repository.init(str(tmp_path / "other"), secret=None, chunk_size=CHUNK) as other:
        list(copy(history.repository, [backup for backup, _ in history.made], other))
        copied = other.backups()
        assert len(copied) == 2
        for backup, (_, data) in zip(copied, history.made, strict=True):
            assert restored(other, backup, tmp_path / "image") == data


def test_what_a_target_holds_already_is_seen_behind_deltas(history: History, tmp_path: Path) -> None:
    (full, before), (second, after) = history.made
    target = tmp_path / "image"
    target.write_bytes(before)
    apply(history.repository, second, target, base=full)
    assert target.read_bytes() == after
    again = restore(history.repository, second, target, RestoreOptions(in_place=True))
    assert again.bytes_written == again.bytes_zeroed == 0
    third = history.back_up((BLOCK, 9))
    result = apply(history.repository, third, target, base=second)
    assert (target.read_bytes(), result.bytes_written) == (history.made[-1][1], BLOCK)


def test_the_sample_compares_with_what_a_delta_makes(history: History) -> None:
    history.disk.write(CHUNK // 2, b"unseen", seen=False)
    history.options = replace(history.options, sample=SampleOptions(share=1.0))
    backup = history.back_up((5 * CHUNK, 9))
    assert (backup.kind, "tracking was found to be wrong" in backup.note) == ("full", True)


def test_the_program_in_the_format_s_description_recovers_deltas(history: History, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "formats" / "repository.md"
    program = page.read_text().split("```python\n")[1].split("```")[0]
    backup, data = history.made[1]
    subprocess.run([sys.executable, "-c", program, history.repository.store.url, "secret", backup.id,
                    tmp_path / "image"], check=True)
    assert (tmp_path / "image").read_bytes() == data
