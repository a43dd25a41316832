# SPDX-License-Identifier: Apache-2.0
"""What a target holds is recognised before it is overwritten: by what the real tools write."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.restore import signatures

MIB = 1 << 20


def probe(path: Path) -> list[str]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return signatures.probe(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def blank(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    ("command", "size", "name"),
    [
        pytest.param(["mkfs.ext4", "-q", "-F"], 8, "ext4", marks=pytest.mark.tool("mkfs.ext4")),
        pytest.param(["mkfs.xfs", "-q", "-f"], 320, "XFS", marks=pytest.mark.tool("mkfs.xfs")),
        pytest.param(["mkswap", "-q"], 8, "swap", marks=pytest.mark.tool("mkswap")),
    ],
)
def test_what_the_tools_make_is_recognised(tmp_path: Path, command: list[str], size: int, name: str) -> None:
    target = blank(tmp_path / "t", size * MIB)
    subprocess.run([*command, str(target)], check=True)
    assert any(name in phrase for phrase in probe(target))


def test_a_boot_sector_is_recognised(tmp_path: Path) -> None:
    target = blank(tmp_path / "t", MIB)
    with target.open("r+b") as file:
        file.write(bytes(510) + b"\x55\xaa")
    assert probe(target) == ["a partition table or boot sector"]


def test_marks_at_the_end_are_found(tmp_path: Path) -> None:
    size = 8 * MIB + 5 * 4096
    for offset, mark, name in [
        (size - 512, b"EFI PART", "GPT"),
        ((size & ~0xFFFF) - 0x10000, bytes.fromhex("a92b4efc"), "RAID"),
        (((size >> 9) - 16 & ~7) << 9, bytes.fromhex("fc4e2ba9"), "RAID"),
    ]:
        target = blank(tmp_path / "t", size)
        with target.open("r+b") as file:
            file.seek(offset)
            file.write(mark)
        assert [phrase for phrase in probe(target) if name in phrase]


@pytest.mark.parametrize(
    ("offset", "mark", "name"),
    [(512, b"LABELONE" + bytes(16) + b"LVM2 001", "LVM"), (128 * 1024 + 3072, b"\x0c\xb1\xba\0\0\0\0\0", "ZFS")],
)
def test_marks_that_may_stand_at_several_places_are_found(
    tmp_path: Path, offset: int, mark: bytes, name: str
) -> None:
    target = blank(tmp_path / "t", MIB)
    with target.open("r+b") as file:
        file.seek(offset)
        file.write(mark)
    assert [phrase for phrase in probe(target) if name in phrase]


@given(size=st.integers(0, 300_000))
@settings(max_examples=30)
def test_nothing_is_found_in_zeroes_of_any_size(size: int) -> None:
    descriptor = os.memfd_create("zeroes")
    try:
        os.ftruncate(descriptor, size)
        assert signatures.probe(descriptor, size) == []
    finally:
        os.close(descriptor)
