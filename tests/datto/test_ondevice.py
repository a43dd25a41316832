# SPDX-License-Identifier: Apache-2.0
"""COW files on the device itself, without a worker: what is made, taken up again and given back."""

from __future__ import annotations

import os
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest

from stasis.datto.cowreader import CowReader
from stasis.datto.ondevice import MappedSource
from stasis.datto.opening import reopen
from stasis.datto.pinned import Pinned
from stasis.errors import StasisError
from stasis.linux import immutable, mounts
from tests.datto.disk import COW_SIZE, Disk, mounted_disk
from tests.system.helpers import LONG, MIB, tool
from tests.unmounting import unmount

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup", "mkfs.ext4", "mkfs.xfs")]


def _is_immutable(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return bool(immutable.file_flags(fd) & immutable.FS_IMMUTABLE_FL)
    finally:
        os.close(fd)


KINDS = [("ext4", ("-b", "1024", "-O", "inline_data"))]
MORE_KINDS = [("xfs", ()), ("ext4", ("-b", "4096")),
              ("ext4", ("-O", "bigalloc", "-C", "16384")), ("ext3", ()), ("ext4", ("-b", "2048", "-O", "^has_journal"))]


@pytest.mark.parametrize(("kind", "make"), KINDS + MORE_KINDS if LONG else KINDS,
                         ids=lambda value: value if isinstance(value, str) else " ".join(value) or "default")
def test_what_is_written_to_the_device_is_in_the_file_once_it_is_given_back(
    short_dir: Path, kind: str, make: tuple[str, ...]
) -> None:
    with mounted_disk(short_dir, kind, make) as disk:
        (disk.mount / "other").write_bytes(b"o" * MIB)
        cow = disk.make()
        path = disk.mount / ".cow"
        assert _is_immutable(path)
        path.read_bytes()  # the page cache has what the file system knows, which is soon old
        old = os.urandom(3 * 4096)
        cow.keep([(5, 7), (9, 10)], memoryview(old))
        slot = cow.geometry.first_slot
        shown = bytearray(2 * 4096)
        cow.read_bytes(slot << 12, memoryview(shown))
        assert shown == old[:8192]
        cow.finish()
        cow.release()
        cow.close()
        assert not _is_immutable(path)
        assert path.stat().st_size == COW_SIZE
        with CowReader(str(path), disk.image.stat().st_size) as reader:
            assert list(reader.extents()) == [(5 * 4096, 8192), (9 * 4096, 4096)]
            assert reader.kept(9) == old[8192:]
        data = path.read_bytes()
        assert data[slot << 12 : (slot << 12) + len(old)] == old
        assert not data[(slot << 12) + len(old) :].strip(b"\0")
        assert (disk.mount / "other").read_bytes() == b"o" * MIB
        assert not list(disk.directory.glob("pinned-*"))
        path.unlink()


def test_it_is_cut_off_by_its_file_system_at_the_transition(disk: Disk) -> None:
    cow = disk.make()
    owned = sum(end - start for start, end in cow.territory.ranges)
    cow.keep([(5, 6)], memoryview(b"x" * 4096))
    cow.become_index_only()
    left = sum(end - start for start, end in cow.territory.ranges)
    path = disk.mount / ".cow"
    assert path.stat().st_size == left == cow.geometry.data_offset < owned
    assert _is_immutable(path)
    assert next(Pinned.all(disk.directory)).size == left
    with pytest.raises(OSError, match="no place"):
        cow._write(memoryview(b"x"), cow.geometry.data_offset)
    cow.mark(8, 9)
    cow.finish()
    cow.release()
    cow.close()
    with CowReader(str(path), disk.image.stat().st_size) as reader:
        assert list(reader.extents()) == [(5 * 4096, 4096), (8 * 4096, 4096)]


def test_a_file_that_is_removed_is_gone_whatever_protected_it(disk: Disk) -> None:
    cow = disk.make()
    cow.unlink()
    with pytest.raises(OSError, match="not ours"):
        cow.write_header()
    cow.close()
    assert not (disk.mount / ".cow").exists()
    assert not list(disk.directory.glob("pinned-*"))


def test_nobody_else_s_file_is_removed(disk: Disk) -> None:
    """The same name and inode: another disk may have both."""
    cow, path = disk.make(), disk.mount / ".cow"
    for wrong in ({"uuid": "00" * 16}, {"seqid": 7}, {"inode": 1}):
        disk.places.remove(Pinned(**{**_fields(cow.pinned), **wrong}))
        assert path.exists()
    tool("chattr", "-i", path)
    path.write_bytes(b"mine" * 100)
    disk.places.remove(cow.pinned)
    assert path.read_bytes() == b"mine" * 100
    cow.close()


def test_it_is_taken_up_by_its_blocks_alone(disk: Disk) -> None:
    cow = disk.make()
    cow.keep([(5, 6)], memoryview(b"x" * 4096))
    cow.close()  # as the death of a worker leaves it
    pinned = Pinned.find(disk.directory, "/.cow")
    assert pinned == Pinned.find(disk.directory, str(disk.mount / ".cow")) == cow.pinned
    unmount(disk.mount)
    again = reopen(MappedSource(disk.places, cow.pinned), disk.image.stat().st_size, index_only=False, cache=MIB,
                   unclean=True)
    assert again.header.changed_blocks == 1
    again.keep([(7, 8)], memoryview(b"y" * 4096))
    again.finish()
    again.close()
    tool("mount", disk.node, disk.mount)
    again.release()
    assert (disk.mount / ".cow").read_bytes()[again.geometry.first_slot << 12 :][:8192] == b"x" * 4096 + b"y" * 4096


def test_where_a_path_lies_is_told_by_its_name_alone(disk: Disk, short_dir: Path) -> None:
    number = os.stat(disk.node).st_rdev
    assert mounts.lies_on(str(disk.mount / ".cow"), number)
    assert mounts.lies_on(str(disk.mount / "missing" / ".cow"), number)
    assert not mounts.lies_on(str(disk.mount), number)  # its name is an entry of the directory above
    assert not mounts.lies_on(str(short_dir / ".cow"), number)


def test_one_that_lies_elsewhere_by_now_is_not_taken_up(disk: Disk) -> None:
    disk.make().close()
    pinned = next(Pinned.all(disk.directory))
    other = disk.make("other", seqid=2)
    wrong = Pinned(**{**_fields(pinned), "stretches": other.pinned.stretches})
    before = disk.image.read_bytes()
    for bad in (wrong, Pinned(**{**_fields(pinned), "stretches": ((0, 1 << 40, COW_SIZE + 512),)})):
        with pytest.raises(StasisError) as caught:
            reopen(MappedSource(disk.places, bad), disk.image.stat().st_size, index_only=False, cache=MIB, unclean=True)
        assert caught.value.errno == EINVAL
    assert disk.image.read_bytes() == before
    other.close()


def _fields(pinned: Pinned) -> dict[str, Any]:
    return {name: getattr(pinned, name) for name in Pinned.__dataclass_fields__}
