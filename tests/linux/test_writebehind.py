# SPDX-License-Identifier: Apache-2.0
"""What is written behind leaves the page cache and stays in the file; a failed writeback is never forgotten."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux import files
from stasis.linux.writebehind import WriteBehind

WINDOW = 256 << 10


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_the_file_holds_what_was_written_in_whatever_order(file: int) -> None:
    behind = WriteBehind(file, WINDOW)
    blocks = {offset: os.urandom(64 << 10) for offset in range(0, 4 << 20, 64 << 10)}
    for offset in sorted(blocks, key=lambda offset: offset * 7919 % 104729):
        os.pwrite(file, blocks[offset], offset)
        behind.wrote(offset, 64 << 10)
    assert all(os.pread(file, 64 << 10, offset) == data for offset, data in blocks.items())


def test_whole_windows_are_sent_and_waited_for_one_window_later(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    for name in ("start_writeback", "wait_writeback"):
        monkeypatch.setattr(files, name, lambda fd, offset, length, name=name: calls.append((name, offset, length)))
    behind = WriteBehind(file, WINDOW)
    for offset in range(0, 3 * WINDOW, WINDOW // 4):
        behind.wrote(offset, WINDOW // 4)
    assert calls == [
        ("start_writeback", 0, WINDOW),
        ("start_writeback", WINDOW, WINDOW),
        ("wait_writeback", 0, WINDOW),
        ("start_writeback", 2 * WINDOW, WINDOW),
        ("wait_writeback", WINDOW, WINDOW),
    ]


def test_a_failed_writeback_is_raised_and_raised_again(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "writeback")

    monkeypatch.setattr(files, "start_writeback", fail)
    behind = WriteBehind(file, WINDOW)
    with pytest.raises(OSError, match="writeback"):
        behind.wrote(0, WINDOW)
    with pytest.raises(OSError, match="writeback"):
        behind.check()


def test_a_file_system_without_writeback_is_left_alone(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EINVAL, "no such thing")

    monkeypatch.setattr(files, "start_writeback", refuse)
    behind = WriteBehind(file, WINDOW)
    behind.wrote(0, WINDOW)
    behind.check()
