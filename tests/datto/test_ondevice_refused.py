# SPDX-License-Identifier: Apache-2.0
"""COW files on the device itself: what is refused, and that nothing is left of it."""

from __future__ import annotations

import os
from errno import EBUSY, EEXIST, EINVAL, EISDIR, ENOSPC, EOPNOTSUPP
from pathlib import Path

import pytest

from stasis.block.origin import Origin
from stasis.datto.fitness import check_inode
from stasis.datto.layout import Geometry
from stasis.datto.ondevice import new_header
from stasis.errors import StasisError
from stasis.linux import immutable
from tests.datto.disk import COW_SIZE, SIZES, UUID, Disk, mounted_disk
from tests.system.helpers import MIB, tool
from tests.unmounting import unmount

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup", "mkfs.ext4", "mkfs.xfs")]


def test_a_map_that_is_not_true_is_found_out_before_anything_is_written(disk: Disk, short_dir: Path) -> None:
    """The device that the worker has is another one than that of the file system."""
    other = short_dir / "other"
    contents = os.urandom(MIB) * SIZES["ext4"]
    other.write_bytes(contents)
    origin = Origin(str(other), os.open(other, os.O_RDWR | os.O_CLOEXEC))
    disk.places._host.origin = origin
    assert "does not lie where" in disk.refuses(EINVAL)
    assert other.read_bytes() == contents
    assert disk.claims[-1] is None
    origin.close()


@pytest.mark.parametrize(("kind", "options", "says"), [
    ("ext4", ("-o", "data=journal"), "journal"),
    pytest.param("btrfs", (), "not directly", marks=pytest.mark.tool("mkfs.btrfs")),
])
def test_file_systems_that_write_elsewhere_first_are_refused(
    short_dir: Path, kind: str, options: tuple[str, ...], says: str
) -> None:
    with mounted_disk(short_dir, kind, (), options) as disk:
        assert says in disk.refuses(EINVAL)


def test_what_cannot_be_used_is_refused_and_stays(disk: Disk) -> None:
    (disk.mount / "mine").write_bytes(b"do not touch")
    (disk.mount / "directory").mkdir()
    disk.refuses(EEXIST, "mine")
    disk.refuses(EISDIR, "directory")
    disk.refuses(ENOSPC, size=SIZES["ext4"] * MIB)
    assert (disk.mount / "mine").read_bytes() == b"do not touch"
    (disk.mount / "empty").touch()
    disk.refuses(EBUSY, "empty", in_use=(disk.mount / "empty").stat().st_ino)


@pytest.mark.parametrize(("flag", "says"), [
    (immutable.FS_ENCRYPT_FL, "encrypted"), (immutable.FS_VERITY_FL, "fs-verity"),
    (immutable.FS_COMPR_FL, "compressed"), (immutable.FS_JOURNAL_DATA_FL, "journal"), (immutable.FS_DAX_FL, "DAX"),
    (immutable.FS_INLINE_DATA_FL, "inode"),
])
def test_a_file_that_is_treated_in_its_own_way_is_refused(
    monkeypatch: pytest.MonkeyPatch, flag: int, says: str
) -> None:
    monkeypatch.setattr(immutable, "file_flags", lambda _fd: flag | 0x80000)
    monkeypatch.setattr(immutable, "extended_flags", lambda _fd: 0)
    with pytest.raises(StasisError, match=says) as caught:
        check_inode(-1, "/mnt/cow")
    assert caught.value.errno == EOPNOTSUPP


def test_a_file_on_the_real_time_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(immutable, "file_flags", lambda _fd: 0)
    monkeypatch.setattr(immutable, "extended_flags", lambda _fd: immutable.FS_XFLAG_REALTIME)
    with pytest.raises(StasisError, match="real-time"):
        check_inode(-1, "/mnt/cow")


def test_places_elsewhere_are_left_to_others(disk: Disk, short_dir: Path) -> None:
    geometry = Geometry(disk.image.stat().st_size)
    for path in (short_dir / "cow", disk.mount / "missing" / "cow"):
        assert disk.places.make(str(path), new_header(UUID, 1, COW_SIZE, geometry), geometry, MIB, disk.node, 0) is None
        assert not path.exists()


def test_a_path_above_the_device_in_another_way_is_refused(disk: Disk, short_dir: Path) -> None:
    """An image file in the file system, mounted by a loop device of its own."""
    with (disk.mount / "inner").open("wb") as file:
        file.truncate(4 * MIB)
    tool("mkfs.ext4", "-q", disk.mount / "inner")
    (short_dir / "above").mkdir()
    tool("mount", "-o", "loop", disk.mount / "inner", short_dir / "above")
    try:
        geometry = Geometry(disk.image.stat().st_size)
        with pytest.raises(StasisError) as caught:
            disk.places.make(str(short_dir / "above" / "cow"), new_header(UUID, 1, COW_SIZE, geometry), geometry, MIB,
                             disk.node, 0)
        assert caught.value.errno == EINVAL
    finally:
        unmount(short_dir / "above")
