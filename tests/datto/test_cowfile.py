# SPDX-License-Identifier: Apache-2.0
"""COW files are dattobd's, byte by byte; what cannot be one is refused and left as it was."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stasis.datto.cowfile import CowFile
from stasis.datto.cowreader import CowReader
from stasis.datto.index import SECTION_SIZE, allowed_sections
from stasis.datto.layout import Geometry, Header, default_size
from stasis.datto.opening import create, reopen
from stasis.errors import StasisError
from tests.datto.cowmodel import CowModel

UUID = bytes(range(16))
MIB = 1 << 20
CACHE = 300 * MIB
SIZE = 40 * MIB + 512
"""Three sections of index, and a last block that is short."""


def _old(block: int) -> bytes:
    return hashlib.sha512(block.to_bytes(8, "big")).digest() * 64


def _create(path: Path, size: int = SIZE, allocated: int = 0, cache: int = CACHE) -> CowFile:
    return create(str(path), size, uuid=UUID, seqid=7, size=allocated, cache=cache)


def _overwrite(cow: CowFile, first: int, end: int) -> None:
    if cow.is_index_only:
        cow.mark(first, end)
        return
    runs = cow.index.runs_without(first, end)
    data = b"".join(_old(block) for low, high in runs for block in range(low, high))
    if data:
        cow.keep(runs, memoryview(data))


# -- the format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "blocks", "sections", "data_offset", "first_slot", "default"), [
    (256 * MIB, 65536, 16, 528384, 129, 26843545),
    (512 * MIB, 131072, 32, 1052672, 257, 53687091),
    (100 << 30, 26214400, 6400, 209719296, 51201, 10737418240),
    (4 << 40, 1073741824, 262144, 8589938688, 2097153, 439804651110),
    ((4096 << 12) + 512, 4097, 2, 69632, 17, 1677772),
])
def test_sizes_are_those_of_the_reference(size: int, blocks: int, sections: int, data_offset: int, first_slot: int,
                                          default: int) -> None:
    geometry = Geometry(size)
    assert (geometry.blocks, geometry.sections) == (blocks, sections)
    assert (geometry.data_offset, geometry.first_slot) == (data_offset, first_slot)
    assert default_size(size) == default


def test_a_new_file_is_the_golden_one(tmp_path: Path) -> None:
    cow = _create(tmp_path / "cow", 256 * MIB)
    cow.close()
    golden = bytes.fromhex(
        "a8120000 00000000 8100000000000000 9999990100000000 0700000000000000"
        " 000102030405060708090a0b0c0d0e0f 0100000000000000 0000000000000000")
    found = (tmp_path / "cow").read_bytes()
    assert found[:64] == golden
    assert len(found) == 26843545
    assert not found[64:].strip(b"\0")


def test_kept_blocks_lie_where_the_golden_file_has_them(tmp_path: Path) -> None:
    cow = _create(tmp_path / "cow", 256 * MIB)
    _overwrite(cow, 4095, 4097)
    _overwrite(cow, 0, 1)
    cow.finish()
    cow.close()
    found = (tmp_path / "cow").read_bytes()
    assert found[:32] == struct.pack("<IIQQQ", 4776, 1, 132, 26843545, 7)
    assert found[0x38:0x40] == struct.pack("<Q", 3)
    assert found[4096:4104] == struct.pack("<Q", 131)
    assert found[4096 + 4095 * 8 : 4096 + 4097 * 8] == struct.pack("<QQ", 129, 130)
    assert found[129 * 4096 : 132 * 4096] == _old(4095) + _old(4096) + _old(0)


def test_an_incremental_file_is_the_golden_one(tmp_path: Path) -> None:
    cow = _create(tmp_path / "cow", 256 * MIB)
    _overwrite(cow, 5, 6)
    cow.become_index_only()
    _overwrite(cow, 4, 7)
    cow.finish()
    cow.close()
    found = (tmp_path / "cow").read_bytes()
    assert len(found) == 528384
    assert found[:24] == struct.pack("<IIQQ", 4776, 3, 130, 528384)
    assert found[0x38:0x40] == struct.pack("<Q", 3)
    assert found[4096 + 32 : 4096 + 56] == struct.pack("<QQQ", 1, 1, 1)


RANGES = st.tuples(st.integers(0, 10240), st.integers(1, 300))
STEPS = st.lists(st.one_of(RANGES, st.sampled_from(["incremental", "reopen", "die"])), max_size=25)


@settings(max_examples=200 if os.environ.get("STASIS_LONG") else 25)
@given(steps=STEPS, version=st.sampled_from([0, 1]), cache=st.sampled_from([0, CACHE]))
def test_file_and_model_are_equal_after_any_history(steps: list[object], version: int, cache: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cow"
        cow = _create(path, allocated=20 * MIB, cache=cache)
        cow.header.version = version
        cow.write_header()
        model = CowModel(SIZE, 20 * MIB, UUID, 7, version)
        for step in steps:
            cow = _step(cow, model, step)
        model.clean = True
        cow.finish()
        cow.close()
        assert path.read_bytes() == model.file()
        _check_reader(path, model)


def _step(cow: CowFile, model: CowModel, step: object) -> CowFile:
    if isinstance(step, tuple):
        first, end = step[0], min(step[0] + step[1], 10241)
        _overwrite(cow, first, end)
        for block in range(first, end):
            model.overwrite(block, _old(block))
    elif step == "incremental":
        if not cow.is_index_only:
            cow.become_index_only()
            model.to_incremental()
    else:
        if step == "reopen":
            cow.finish()
        cow.close()
        return reopen(cow.path, SIZE, index_only=cow.is_index_only, cache=0, unclean=step == "die")
    return cow


def _check_reader(path: Path, model: CowModel) -> None:
    with CowReader(str(path), SIZE) as reader:
        assert [block for first, end in reader.changed() for block in range(first, end)] == sorted(model.index)
        assert sum(length for _, length in reader.extents()) <= SIZE
        for block, slot in list(model.index.items())[:20]:
            kept = None if model.index_only else model.data[slot - model.data_offset // 4096]
            assert reader.kept(block) == kept


def test_extents_join_neighbours_and_end_with_the_device(tmp_path: Path) -> None:
    cow = _create(tmp_path / "cow", allocated=MIB)
    _overwrite(cow, 4094, 4098)
    _overwrite(cow, 10240, 10241)
    cow.finish()
    cow.close()
    with CowReader(cow.path, SIZE) as reader:
        assert list(reader.extents()) == [(4094 << 12, 4 << 12), (10240 << 12, 512)]


def test_a_file_of_the_module_lacks_the_short_last_block_and_it_counts_as_changed(tmp_path: Path) -> None:
    """dattobd has no index entry for it where it would begin a section: what lies there is data."""
    path, size = tmp_path / "cow", (4096 << 12) + 512
    theirs = CowModel(4096 << 12, MIB, UUID, 1)
    theirs.overwrite(3, _old(3))
    theirs.clean = True
    path.write_bytes(theirs.file())
    with CowReader(str(path), size) as reader:
        assert list(reader.extents()) == [(3 << 12, 4096), (4096 << 12, 512)]
    theirs.to_incremental()
    path.write_bytes(theirs.file())
    with CowReader(str(path), size) as reader:
        assert list(reader.extents()) == [(3 << 12, 4096), (4096 << 12, 512)]


# -- limits ---------------------------------------------------------------------------------------------


def test_a_full_file_publishes_nothing_more_and_takes_more_once_it_has_grown(tmp_path: Path) -> None:
    geometry = Geometry(SIZE)
    cow = _create(tmp_path / "cow", allocated=geometry.data_offset + 3 * 4096)
    _overwrite(cow, 0, 2)
    assert cow.filled_percent == 66
    with pytest.raises(OSError) as caught:
        _overwrite(cow, 10, 12)
    assert caught.value.errno == errno.EFBIG
    assert cow.index.entries(10, 12) == [0, 0]
    cow.expand(MIB)
    _overwrite(cow, 10, 12)
    assert cow.header.fsize == os.stat(cow.path).st_size == geometry.data_offset + 3 * 4096 + MIB
    cow.close()


@pytest.mark.parametrize("cache", [0, 10 * SECTION_SIZE, 40 * SECTION_SIZE])
def test_the_index_in_memory_stays_below_its_limit(tmp_path: Path, cache: int) -> None:
    """4 TiB: a sparse file of an index, of which every thousandth section is used."""
    size = 4 << 40
    cow = _create(tmp_path / "cow", 1 << 30, allocated=MIB)
    os.truncate(cow.fd, Geometry(size).data_offset)
    big = CowFile(cow.path, cow.fd, Geometry(size), cow.header, cache + 262144 * 24, fresh=True)
    for section in range(0, 262144, 1000):
        big.mark(section << 12, (section << 12) + 1)
        assert big.index.loaded <= max(8, cache // SECTION_SIZE)
    assert big.header.changed_blocks == 263
    assert all(big.index.entries(section << 12, (section << 12) + 2) == [1, 0] for section in range(0, 262144, 1000))
    cow.close()


def test_the_default_cache_holds_as_many_sections_as_dattobd_s() -> None:
    assert allowed_sections(CACHE, 32) == 9599
    assert allowed_sections(400, 32) == 8


# -- what is refused --------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Path]:
    """A clean snapshot's file with a few blocks."""
    cow = _create(tmp_path / "cow", allocated=MIB)
    _overwrite(cow, 100, 110)
    cow.finish()
    cow.close()
    return tmp_path / "cow"


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(("offset", "data", "number"), [
    (0, b"\0", errno.EINVAL),
    (4, b"\0", errno.EINVAL),
    (4, b"\3", errno.EINVAL),
    (8, struct.pack("<Q", 1 << 40), errno.EINVAL),
    (8, struct.pack("<Q", 2), errno.EINVAL),
    (0x38, struct.pack("<Q", 11), errno.EINVAL),
    (4096 + 100 * 8, struct.pack("<Q", 1 << 50), errno.EINVAL),
    (4096 + 100 * 8, struct.pack("<Q", 2), errno.EINVAL),
    (4096 + 9000 * 8, struct.pack("<Q", 1), errno.EINVAL),
], ids=["magic", "unclean", "other mode", "end behind the file", "end before the data", "count", "entry behind",
        "entry before", "entry too many"])
def test_a_file_that_cannot_be_right_is_refused_and_left_alone(finished: Path, offset: int, data: bytes,
                                                               number: int) -> None:
    _patch(finished, offset, data)
    before = finished.read_bytes()
    with pytest.raises(StasisError) as caught:
        reopen(str(finished), SIZE, index_only=False, cache=CACHE)
    assert caught.value.errno == number
    assert finished.read_bytes() == before


@pytest.mark.parametrize(("length", "number"), [(0, errno.EIO), (63, errno.EIO), (50000, errno.EINVAL)])
def test_a_cut_off_file_is_refused(finished: Path, length: int, number: int) -> None:
    os.truncate(finished, length)
    with pytest.raises(StasisError) as caught:
        reopen(str(finished), SIZE, index_only=False, cache=CACHE)
    assert caught.value.errno == number
    with pytest.raises(StasisError):
        CowReader(str(finished), SIZE)


@pytest.mark.parametrize("size", [20 * MIB, 80 * MIB, 1 << 40])
def test_a_file_of_a_device_of_another_size_is_refused(finished: Path, size: int) -> None:
    with pytest.raises(StasisError) as caught:
        reopen(str(finished), size, index_only=False, cache=CACHE)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(StasisError):
        CowReader(str(finished), size)


def test_a_missing_file_and_one_in_use_are_refused(finished: Path) -> None:
    with pytest.raises(StasisError) as caught:
        reopen(str(finished) + "x", SIZE, index_only=False, cache=CACHE)
    assert caught.value.errno == errno.ENOENT
    with finished.open() as user:
        fcntl.flock(user, fcntl.LOCK_EX)
        for call in (lambda: reopen(str(finished), SIZE, index_only=False, cache=CACHE), lambda: _create(finished)):
            with pytest.raises(StasisError) as caught:
                call()
            assert caught.value.errno == errno.EBUSY


def test_a_new_file_replaces_an_old_cow_file_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    cow = _create(finished, allocated=MIB)
    cow.close()
    assert Header.unpack(finished.read_bytes()[:64], "").changed_blocks == 0
    (tmp_path / "letter").write_text("dear")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, number in (("letter", errno.EEXIST), ("pipe", errno.EISDIR), ("fifo", errno.EINVAL),
                         ("none/cow", errno.ENOENT)):
        with pytest.raises(StasisError) as caught:
            _create(tmp_path / name)
        assert caught.value.errno == number
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_file_that_has_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StasisError) as caught:
        _create(tmp_path / "cow", allocated=1 << 60)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


def test_only_the_file_itself_is_unlinked(finished: Path) -> None:
    cow = reopen(str(finished), SIZE, index_only=False, cache=CACHE)
    finished.rename(finished.with_name("moved"))
    finished.write_text("somebody else's")
    cow.unlink()
    assert finished.read_text() == "somebody else's"
    finished.with_name("moved").replace(finished)
    cow.unlink()
    assert not finished.exists()
    cow.close()


# -- after a crash ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("was_incremental", [False, True])
def test_what_a_power_cut_may_have_taken_counts_as_changed(tmp_path: Path, was_incremental: bool) -> None:
    cow = _create(tmp_path / "cow", allocated=MIB)
    _overwrite(cow, 100, 110)
    if was_incremental:
        cow.become_index_only()
        _overwrite(cow, 200, 201)
    cow.close()
    cow = reopen(cow.path, SIZE, index_only=True, cache=CACHE, unclean=True, suspects=[(104 << 12, 20 << 12)])
    cow.finish()
    cow.close()
    expected = [*range(100, 124), *([200] if was_incremental else [])]
    with CowReader(cow.path, SIZE) as reader:
        assert [block for first, end in reader.changed() for block in range(first, end)] == expected
        assert reader.header.changed_blocks == len(expected)
        assert reader.header.is_index_only
