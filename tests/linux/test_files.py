# SPDX-License-Identifier: Apache-2.0
"""Holes, extents, unnamed and sealed files on the file system of the test directory."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stasis.linux import files

BLOCK = 4096


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield number
    os.close(number)


def test_extents_tell_data_from_holes_and_cover_the_range(fd: int) -> None:
    os.ftruncate(fd, 100 * BLOCK)
    os.pwrite(fd, b"x" * BLOCK, 16 * BLOCK)
    assert list(files.data_extents(fd, 0, 200 * BLOCK)) == [
        (0, 16 * BLOCK, False),
        (16 * BLOCK, BLOCK, True),
        (17 * BLOCK, 183 * BLOCK, False),
    ]


def test_extents_are_cut_at_the_range(fd: int) -> None:
    os.pwrite(fd, b"x" * 4 * BLOCK, 0)
    assert list(files.data_extents(fd, 100, 200)) == [(100, 200, True)]
    assert list(files.data_extents(fd, 100, 0)) == []


def test_extents_of_a_file_that_cannot_tell_are_all_data() -> None:
    with open("/proc/self/status", "rb") as file:
        assert list(files.data_extents(file.fileno(), 0, BLOCK)) == [(0, BLOCK, True)]


def test_punched_hole_reads_zero_and_keeps_size(fd: int) -> None:
    os.pwrite(fd, b"x" * 4 * BLOCK, 0)
    files.punch_hole(fd, BLOCK, BLOCK)
    assert os.fstat(fd).st_size == 4 * BLOCK
    assert os.pread(fd, 3 * BLOCK, 0) == b"x" * BLOCK + bytes(BLOCK) + b"x" * BLOCK
    assert (BLOCK, BLOCK, False) in list(files.data_extents(fd, 0, 4 * BLOCK))


def test_zero_range_keeps_or_raises_the_size(fd: int) -> None:
    os.pwrite(fd, b"x" * BLOCK, 0)
    try:
        files.zero_range(fd, 0, 2 * BLOCK)
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system has no FALLOC_FL_ZERO_RANGE")
        raise
    assert os.fstat(fd).st_size == BLOCK
    files.zero_range(fd, 0, 2 * BLOCK, keep_size=False)
    assert os.pread(fd, 3 * BLOCK, 0) == bytes(2 * BLOCK)


def test_allocate_raises_size_and_takes_space(fd: int) -> None:
    files.allocate(fd, 0, 1 << 20)
    status = os.fstat(fd)
    assert status.st_size == 1 << 20
    assert status.st_blocks * 512 >= 1 << 20


def test_failed_fallocate_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "read-only"
    path.touch()
    with path.open("rb") as file, pytest.raises(OSError, match="fallocate") as caught:
        files.allocate(file.fileno(), 0, BLOCK)
    assert caught.value.errno == errno.EBADF
    assert caught.value.filename == str(path)


def test_healthy_file_has_no_writeback_error(fd: int) -> None:
    os.pwrite(fd, b"x", 0)
    files.writeback_error(fd)


def test_writeback_error_reports_a_descriptor_that_cannot_have_one() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="writeback") as caught:
            files.writeback_error(read_end)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(read_end)
        os.close(write_end)


_open = os.open


def _open_without_tmpfile(path: str, flags: int, mode: int = 0o777) -> int:
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here", path)
    return _open(path, flags, mode)


@pytest.mark.parametrize("supported", [True, False])
def test_unnamed_file_is_private_and_leaves_no_name(
    tmp_path: Path, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported:
        monkeypatch.setattr(os, "open", _open_without_tmpfile)
    fd = files.open_unnamed(str(tmp_path))
    try:
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert os.listdir(tmp_path) == []
        os.write(fd, b"kept")
        again = files.reopen(fd, os.O_RDONLY)
        assert os.read(again, 10) == b"kept"
        os.close(again)
    finally:
        os.close(fd)


def test_sealed_memory_cannot_shrink_but_grows() -> None:
    fd = files.create_memfd("test", 8 * BLOCK)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, BLOCK)
        os.ftruncate(fd, 9 * BLOCK)
        assert os.fstat(fd).st_size == 9 * BLOCK
    finally:
        os.close(fd)


def little_by_little(call: files.Vectored) -> files.Vectored:
    """The same call, but it does at most 3 bytes."""

    def short(fd: int, places: Sequence[memoryview], offset: int) -> int:
        return call(fd, [places[0][:3]], offset)

    return short


@pytest.mark.parametrize("done", range(11))
def test_the_rest_of_a_short_transfer_is_done_whatever_was_done_before(fd: int, done: int) -> None:
    data = bytes(range(1, 11))
    os.pwrite(fd, data[:done], 100)
    places = [memoryview(data)[:4], memoryview(data)[4:4], memoryview(data)[4:]]
    files.transfer_rest(little_by_little(os.pwritev), fd, places, 100, done)
    assert os.pread(fd, 20, 100) == data
    found = bytearray(data[:done].ljust(10, b"\0"))
    places = [memoryview(found)[:4], memoryview(found)[4:]]
    files.transfer_rest(little_by_little(os.preadv), fd, places, 100, done)
    assert found == data


def test_a_short_read_at_the_end_of_the_file_is_an_error(fd: int) -> None:
    os.pwrite(fd, b"x" * 8, 0)
    with pytest.raises(OSError) as caught:
        files.transfer_rest(os.preadv, fd, [memoryview(bytearray(16))], 0, 4)
    assert caught.value.errno == errno.EIO
