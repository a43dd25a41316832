# SPDX-License-Identifier: Apache-2.0
"""Points in time that a file system makes by itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from stasis.live.providers import Reflink, open_file, probe_ways
from tests.live.disks import MIB, formatted, writing

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.xfs", "mkfs.ext4", "losetup")]


@pytest.mark.parametrize("kind", ["xfs", pytest.param("btrfs", marks=pytest.mark.tool("mkfs.btrfs"))])
def test_a_file_that_is_written_is_read_as_it_was(kind: str, tmp_path: Path) -> None:
    """The two ends of the file are written one after the other, and are equal before the first write of each round."""
    with formatted(kind, tmp_path) as disk:
        image = disk.directory / "image"
        image.write_bytes(bytes(8 * MIB))
        fd = os.open(image, os.O_RDWR)

        def write(number: int) -> None:
            os.pwrite(fd, number.to_bytes(8, "big"), 0)
            os.pwrite(fd, number.to_bytes(8, "big"), 8 * MIB - 8)

        with writing(write):
            source = open_file("image", str(image))
            reader = source.open_reader()
            ends = bytearray(16)
            reader.read_into([(0, 8), (8 * MIB - 8, 8)], memoryview(ends))
        first, last = int.from_bytes(ends[:8], "big"), int.from_bytes(ends[8:], "big")
        assert first - last in (0, 1)
        assert source.taken is not None
        assert source.disturbed() == ""
        reader.close()
        source.close()
        os.close(fd)
        assert os.listdir(disk.directory) in (["image"], ["lost+found", "image"])


def test_where_it_cannot_be_had_the_file_is_read_as_it_lies(tmp_path: Path) -> None:
    with formatted("ext4", tmp_path) as disk:
        image = disk.directory / "image"
        image.write_bytes(bytes(MIB))
        assert Reflink().why_not(str(image))
        source = open_file("image", str(image))
        assert source.taken is None
        image.write_bytes(b"other")
        assert "was written to" in source.disturbed()
        source.close()


def test_a_loop_device_is_as_good_as_its_file(tmp_path: Path) -> None:
    with formatted("xfs", tmp_path) as disk:
        inner = disk.directory / "inner.img"
        inner.write_bytes(bytes(MIB))
        node = subprocess.run(["losetup", "--find", "--show", inner], capture_output=True, text=True, check=True)
        try:
            found = {one.name: one for one in probe_ways(node.stdout.strip())}
            assert found["point in time by reflink"].available
            assert str(inner) in found["point in time by reflink"].detail
        finally:
            subprocess.run(["losetup", "--detach", node.stdout.strip()], check=True)
