# SPDX-License-Identifier: Apache-2.0
"""COW files on the device itself, without a worker: what is made, what is refused, and that a failure leaves nothing.

A loop device stands for the kernel node and its backing file for the origin, so both sides see the same bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EBUSY, EEXIST, EINVAL, EISDIR, ENOSPC, EOPNOTSUPP
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stasis.block.origin import Origin
from stasis.datto.claim import Claim
from stasis.datto.cowreader import CowReader
from stasis.datto.fitness import check_inode
from stasis.datto.helper import Session
from stasis.datto.layout import Geometry
from stasis.datto.mapped import MappedCowFile
from stasis.datto.ondevice import MappedSource, Places, new_header
from stasis.datto.opening import reopen
from stasis.datto.pinned import Pinned
from stasis.datto.placing import temporary_name
from stasis.errors import StasisError
from stasis.linux import immutable, loop, mounts, reflink
from tests.system.helpers import LONG, MIB, tool
from tests.system.ondevice import unmount

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup", "mkfs.ext4", "mkfs.xfs")]

SIZES = {"ext4": 64, "ext3": 64, "xfs": 300, "btrfs": 120}
CHECK = {"ext4": ["e2fsck", "-fn"], "ext3": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}
HELPER = "stasis.daemon.cowhelper"
COW_SIZE = 3 * MIB + 512
UUID = b"0123456789abcdef"


@dataclass
class Disk:
    """A mounted file system; `image` is what lies below it."""

    node: str
    image: Path
    mount: Path
    directory: Path
    places: Places
    claims: list[Claim | None]

    def make(self, name: str = ".cow", size: int = COW_SIZE, in_use: int = 0, seqid: int = 1) -> MappedCowFile:
        geometry = Geometry(self.image.stat().st_size)
        cow = self.places.make(str(self.mount / name), new_header(UUID, seqid, size, geometry), geometry, MIB,
                               self.node, in_use)
        assert cow is not None
        return cow

    def refuses(self, errno: int, name: str = ".cow", size: int = COW_SIZE, **fields: Any) -> str:
        """Nothing is left behind of what is refused."""
        before = sorted(self.mount.iterdir())
        with pytest.raises(StasisError) as caught:
            self.make(name, size, **fields)
        assert caught.value.errno == errno, caught.value.message
        assert sorted(self.mount.iterdir()) == before
        assert not list(self.directory.glob("pinned-*"))
        return caught.value.message


@contextmanager
def _disk(directory: Path, kind: str, make: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> Iterator[Disk]:
    image, mount = directory / "image", directory / "mnt"
    with image.open("wb") as file:
        file.truncate(SIZES[kind] * MIB)
    node = loop.attach(str(image), 512, SIZES[kind] * MIB, read_only=False, direct=True)
    origin = Origin(str(image), os.open(image, os.O_RDWR | os.O_CLOEXEC))
    try:
        tool(f"mkfs.{kind}", "-q", *make, node)
        mount.mkdir()
        tool("mount", *options, node, mount)
        try:
            claims: list[Claim | None] = []
            host: Any = SimpleNamespace(origin=origin, tracker=None, background=_Background())
            places = Places(host, HELPER, claims.append)
            places.directory = directory
            yield Disk(node, image, mount, directory, places, claims)
        finally:
            unmount(mount)
        tool(*CHECK[kind], node)
    finally:
        origin.close()
        loop.detach(node)


class _Background:
    def run(self, job: Any, done: Any) -> None:
        try:
            job()
        except OSError as error:
            done(error)
        else:
            done(None)


@pytest.fixture
def disk(short_dir: Path) -> Iterator[Disk]:
    with _disk(short_dir, "ext4") as disk:
        yield disk


def _is_immutable(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return bool(immutable.file_flags(fd) & immutable.FS_IMMUTABLE_FL)
    finally:
        os.close(fd)


# -- what is made -------------------------------------------------------------------------------------------


KINDS = [("ext4", ("-b", "1024", "-O", "inline_data"))]
MORE_KINDS = [("xfs", ()), ("ext4", ("-b", "4096")),
              ("ext4", ("-O", "bigalloc", "-C", "16384")), ("ext3", ()), ("ext4", ("-b", "2048", "-O", "^has_journal"))]


@pytest.mark.parametrize(("kind", "make"), KINDS + MORE_KINDS if LONG else KINDS,
                         ids=lambda value: value if isinstance(value, str) else " ".join(value) or "default")
def test_what_is_written_to_the_device_is_in_the_file_once_it_is_given_back(
    short_dir: Path, kind: str, make: tuple[str, ...]
) -> None:
    with _disk(short_dir, kind, make) as disk:
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


# -- what is refused ----------------------------------------------------------------------------------------


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
    with _disk(short_dir, kind, (), options) as disk:
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


# -- protection ----------------------------------------------------------------------------------------------


def test_who_has_the_file_open_for_writing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    with (tmp_path / "file").open("r+b") as mine:
        assert not immutable.has_other_writers(mine.fileno())
        with (tmp_path / "file").open("r+b") as other:
            assert immutable.has_other_writers(mine.fileno())
            mapping = mmap.mmap(other.fileno(), 8192)
        assert immutable.has_other_writers(mine.fileno())  # closed, but mapped
        mapping.close()
        assert not immutable.has_other_writers(mine.fileno())


def _before(monkeypatch: pytest.MonkeyPatch, word: str, action: Callable[[Session], None]) -> None:
    """Do something once, before the helper is asked for a step."""
    real, left = Session.ask, [action]

    def ask(self: Session, **fields: Any) -> dict[str, Any]:
        if word in fields and left:
            left.pop()(self)
        return real(self, **fields)

    monkeypatch.setattr(Session, "ask", ask)


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_file_that_somebody_can_write_to_is_not_used(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who opened it before it was protected could write old pages over what lies there."""
    with contextlib.ExitStack() as held:
        def open_it(session: Session) -> None:
            fd = os.open(temporary_name(str(disk.mount / ".cow"), session.process.pid), os.O_RDWR)
            held.callback(mmap.mmap(fd, 4096).close if how == "mapped" else partial(os.close, fd))
            if how == "mapped":
                os.close(fd)

        _before(monkeypatch, "token", open_it)
        assert "open for writing" in disk.refuses(EBUSY)
    monkeypatch.undo()
    disk.make().close()


@pytest.mark.parametrize("step", ["settle", "keep"])
def test_blocks_that_somebody_else_wrote_meanwhile_are_not_used(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def write(_session: Session) -> None:
        claim = disk.claims[-1]
        assert claim is not None
        start, _ = claim.territory.ranges[0]
        claim.see([(start, 512, 0)])

    _before(monkeypatch, step, write)
    assert "taken away" in disk.refuses(EBUSY)
    assert disk.claims[-1] is None


def test_no_page_of_a_file_stays_in_memory(disk: Disk) -> None:
    (disk.mount / "file").write_bytes(os.urandom(MIB))
    with (disk.mount / "file").open("rb") as file:
        file.read()
        assert immutable.resident_pages(file.fileno()) == MIB // mmap.PAGESIZE
        immutable.drop_cache(file.fileno())
        assert immutable.resident_pages(file.fileno()) == 0


@pytest.mark.parametrize("kind", ["ext4", "xfs"] if LONG else ["xfs"])
def test_while_it_is_in_use_nobody_moves_or_changes_it(short_dir: Path, kind: str) -> None:
    with _disk(short_dir, kind) as disk:
        cow, path = disk.make(), disk.mount / ".cow"
        (disk.mount / "bait").write_bytes(b"b" * MIB)
        attempts = [
            ["rm", "-f", path], ["truncate", "-s", "0", path], ["mv", disk.mount / "bait", path],
            ["mv", path, disk.mount / "away"], ["fallocate", "-p", "-o", "0", "-l", "4096", path],
            ["fallocate", "-c", "-o", "0", "-l", "4096", path], ["fallocate", "-z", "-l", "4096", path],
            ["fallocate", "-o", "0", "-l", "9M", path], ["ln", path, disk.mount / "link"],
            ["dd", "if=/dev/zero", f"of={path}", "bs=4096", "count=1", "conv=notrunc"],
        ]
        for attempt in attempts:
            assert subprocess.run([str(word) for word in attempt], capture_output=True).returncode, attempt
        move = ["e4defrag", "-v"] if kind == "ext4" else ["xfs_fsr", "-v"]
        subprocess.run([*move, str(path)], capture_output=True, timeout=60)
        disk.places.verify(cow.pinned, disk.node)
        if kind == "xfs":
            _share(path, disk.mount / "clone")
            disk.places.verify(cow.pinned, disk.node)
        cow.keep([(1, 2)], memoryview(b"k" * 4096))
        cow.finish()
        cow.release()
        cow.close()
        with CowReader(str(path), disk.image.stat().st_size) as reader:
            assert reader.kept(1) == b"k" * 4096


def _share(path: Path, clone: Path) -> None:
    source, target = os.open(path, os.O_RDONLY), os.open(clone, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        reflink.clone(source, target)
        with pytest.raises(OSError, match="FICLONE"):
            reflink.clone(target, source)
    finally:
        os.close(source)
        os.close(target)


def test_who_takes_the_protection_off_and_moves_it_is_found_out(disk: Disk) -> None:
    cow, path = disk.make(), disk.mount / ".cow"
    tool("chattr", "-i", path)
    with pytest.raises(OSError, match="protection"):
        disk.places.verify(cow.pinned, disk.node)
    contents = path.read_bytes()
    path.rename(disk.mount / "away")
    path.write_bytes(contents)
    with pytest.raises(OSError, match="another file"):
        disk.places.verify(cow.pinned, disk.node)
    cow.close()


# -- deaths ----------------------------------------------------------------------------------------------------


class _Died(BaseException):
    """The worker did."""


STEPS = ("filled", "compared", "settled", "kept")
DEATHS = [(who, step) for who in ("worker", "helper", "both") for step in STEPS]


@pytest.mark.parametrize(("who", "step"), DEATHS if LONG else DEATHS[1::5])
def test_whoever_dies_while_it_is_made_leaves_nothing_in_the_way(
    disk: Disk, who: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Session.ask, 0
    last = 2 + STEPS.index(step)

    def ask(self: Session, **fields: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked == last:
            if who != "worker":
                self.process.kill()
                self.process.wait()
            if who != "helper":
                raise _Died
        return real(self, **fields)

    monkeypatch.setattr(Session, "ask", ask)
    if who != "helper":
        monkeypatch.setattr(Places, "_clear_away", lambda _places, session, _pinned: session.end())
    with pytest.raises((_Died, StasisError)):
        disk.make()
    monkeypatch.undo()
    if who != "both":
        assert not [path for path in disk.mount.iterdir() if "cow" in path.name]
    cow = disk.make()
    assert [path.name for path in disk.mount.iterdir() if "cow" in path.name] == [".cow"]
    cow.unlink()
    cow.close()
