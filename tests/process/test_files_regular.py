# SPDX-License-Identifier: Apache-2.0
"""Files, directories, pipes and fifos come back with positions, flags and contents; deleted files, too."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from stasis.process.files.options import FileOptions
from tests.process.cycles import cycle, findings_of

pytestmark = pytest.mark.root

MIB = 1 << 20


def test_files_keep_position_flags_and_who_shares_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("0123456789")

    def set_up() -> list[int]:
        first = os.open(tmp_path / "file", os.O_RDWR | os.O_APPEND)
        os.lseek(first, 4, os.SEEK_SET)
        second = os.dup2(first, 20)
        return [first, second, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), os.open("/dev/zero", os.O_RDONLY)]

    def verify(fds: list[int]) -> None:
        first, second, directory, zero = fds
        assert os.read(first, 3) == b"456"
        assert os.read(second, 2) == b"78"
        os.write(second, b"end")
        assert (tmp_path / "file").read_text() == "0123456789end"
        assert not os.get_inheritable(first)
        assert os.get_inheritable(second)
        assert "file" in os.listdir(directory)
        assert os.read(zero, 2) == b"\0\0"

    cycle(tmp_path / "images", set_up, verify)


def test_a_deleted_file_comes_back_with_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "gone"

    def set_up() -> list[int]:
        writer = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        os.pwrite(writer, b"start", 0)
        os.pwrite(writer, b"end", 3 * MIB)
        os.ftruncate(writer, 1 << 30)
        os.lseek(writer, 2, os.SEEK_SET)
        reader = os.open(path, os.O_RDONLY)
        os.utime(writer, (1000, 2000))
        path.unlink()
        return [writer, reader]

    def verify(fds: list[int]) -> None:
        writer, reader = fds
        status = os.fstat(writer)
        assert (status.st_size, status.st_nlink, status.st_mode & 0o777) == (1 << 30, 0, 0o640)
        assert status.st_mtime == 2000
        assert status.st_blocks * 512 <= 1 * MIB
        assert os.read(writer, 3) == b"art"
        assert os.pread(reader, 3, 3 * MIB) == b"end"
        os.write(writer, b"!")
        assert os.pread(reader, 6, 0) == b"start!"
        assert os.readlink(f"/proc/self/fd/{writer}") == f"{path} (deleted)"

    cycle(tmp_path / "images", set_up, verify)
    assert os.listdir(tmp_path) == ["images"]


def test_a_deleted_file_does_not_take_its_names_new_owner(tmp_path: Path) -> None:
    path = tmp_path / "name"

    def set_up() -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.write(fd, b"old")
        path.unlink()
        path.write_text("new")
        return fd

    def verify(fd: int) -> None:
        assert os.pread(fd, 10, 0) == b"old"

    cycle(tmp_path / "images", set_up, verify)
    assert path.read_text() == "new"


def test_a_deleted_directory_comes_back(tmp_path: Path) -> None:
    def set_up() -> int:
        (tmp_path / "directory").mkdir()
        fd = os.open(tmp_path / "directory", os.O_RDONLY)
        (tmp_path / "directory").rmdir()
        return fd

    def verify(fd: int) -> None:
        assert os.listdir(fd) == []
        assert not os.fstat(fd).st_nlink

    cycle(tmp_path / "images", set_up, verify)


def test_a_file_that_lost_one_of_its_names_is_opened_by_another(tmp_path: Path) -> None:
    def set_up() -> int:
        fd = os.open(tmp_path / "first", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"text")
        os.link(tmp_path / "first", tmp_path / "second")
        (tmp_path / "first").unlink()
        return fd

    def verify(fd: int) -> None:
        assert os.path.samestat(os.fstat(fd), os.stat(tmp_path / "second"))

    cycle(tmp_path / "images", set_up, verify)


def test_a_large_deleted_file_is_named_with_the_option(tmp_path: Path) -> None:
    def set_up() -> int:
        fd = os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(64 << 10))
        (tmp_path / "gone").unlink()
        return fd

    (finding,) = findings_of(set_up, tmp_path / "images", FileOptions(ghost_limit=4096))
    assert "gone" in finding.resource
    assert finding.option == "--ghost-limit 64K"


def test_a_file_whose_name_is_anothers_is_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()

    def set_up() -> int:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.link(tmp_path / "file", tmp_path / "elsewhere" / "file")
        (tmp_path / "file").unlink()
        return fd

    (finding,) = findings_of(set_up, tmp_path / "images")
    assert "lost the name" in finding.reason


def test_pipes_keep_contents_capacity_and_flags(tmp_path: Path) -> None:
    def set_up() -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_NONBLOCK)
        os.write(writer, b"unread")
        return reader, writer

    def verify(pipe: Any) -> None:
        reader, writer = pipe
        assert os.read(reader, 100) == b"unread"
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.write(writer, b"more")
        assert os.read(reader, 100) == b"more"

    cycle(tmp_path / "images", set_up, verify)


def test_a_pipe_of_the_caller_takes_the_place_of_one_that_was(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    callers = os.dup2(writer, 700)
    pipe = f"pipe:[{os.fstat(writer).st_ino}]"

    def set_up() -> int:
        return os.dup2(callers, 5)

    def verify(fd: int) -> None:
        os.write(fd, b"hello")

    try:
        cycle(tmp_path / "images", set_up, verify, options=FileOptions(inherited={pipe: callers}))
        assert os.read(reader, 10) == b"hello"
    finally:
        for fd in (reader, writer, callers):
            os.close(fd)


def test_a_fifo_keeps_its_contents_and_its_ends(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        os.mkfifo(tmp_path / "fifo")
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(tmp_path / "fifo", os.O_WRONLY)
        os.write(writer, b"unread")
        return [reader, writer]

    def verify(fds: list[int]) -> None:
        reader, writer = fds
        assert os.read(reader, 100) == b"unread"
        assert not os.get_blocking(reader)
        assert os.get_blocking(writer)
        os.close(writer)
        assert os.read(reader, 1) == b""

    cycle(tmp_path / "images", set_up, verify)


def test_a_memory_file_keeps_contents_holes_and_seals(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        plain = os.memfd_create("plain")
        sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.pwrite(sealed, b"start", 0)
        os.pwrite(sealed, b"end", 5 * MIB)
        os.ftruncate(sealed, 6 * MIB + 5)
        os.lseek(sealed, 2, os.SEEK_SET)
        reader = os.open(f"/proc/self/fd/{sealed}", os.O_RDONLY)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
        return [plain, sealed, reader]

    def verify(fds: list[int]) -> None:
        plain, sealed, reader = fds
        assert os.readlink(f"/proc/self/fd/{plain}") == "/memfd:plain (deleted)"
        assert os.fstat(plain).st_size == 0
        assert os.fstat(sealed).st_size == 6 * MIB + 5
        assert os.read(sealed, 3) == b"art"
        assert os.pread(reader, 5, 5 * MIB) == b"end\0\0"
        assert os.fstat(reader).st_blocks * 512 < MIB
        assert fcntl.fcntl(sealed, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
        assert fcntl.fcntl(plain, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL
        with pytest.raises(OSError, match="Bad file"):
            os.write(reader, b"x")

    cycle(tmp_path / "images", set_up, verify)
