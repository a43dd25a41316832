# SPDX-License-Identifier: Apache-2.0
"""The places that FIEMAP tells of are those where the file was written, and many extents take several calls."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stasis.linux import fiemap

BLOCK = 64 << 10


def _extents(fd: int, **arguments: int) -> list[fiemap.FileExtent]:
    try:
        return list(fiemap.extents(fd, flags=fiemap.FIEMAP_FLAG_SYNC, **arguments))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system does not tell where files lie")
        raise


def test_data_and_holes_are_told_apart(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(20):
            os.pwrite(file.fileno(), b"x" * BLOCK, 2 * number * BLOCK)
        whole = _extents(file.fileno())
        assert whole[0].logical == 0
        covered = {place // BLOCK for one in whole for place in range(one.logical, one.logical + one.length, BLOCK)}
        assert covered == set(range(0, 40, 2))
        assert _extents(file.fileno(), per_call=3) == whole
        part = _extents(file.fileno(), offset=4 * BLOCK, length=BLOCK)
        assert [one.logical // BLOCK for one in part] == [4]


def test_an_empty_file_has_no_extents(tmp_path: Path) -> None:
    with (tmp_path / "empty").open("wb") as file:
        assert _extents(file.fileno()) == []


def test_the_error_names_the_call() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="FS_IOC_FIEMAP"):
            list(fiemap.extents(reader))
    finally:
        os.close(reader)
        os.close(writer)
