# SPDX-License-Identifier: Apache-2.0
"""Origins: opened alone, refused by name when somebody has them, read and written right to their last byte."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block.mapformat import NO_FS_MARK
from stasis.block.opening import open_origin
from stasis.errors import BusyError, NotFoundError, UsageError
from tests.block.engine import Engine, is_corrupted, pread, pread_many, pwrite_many
from tests.block.loops import loop_device
from tests.block.workers import WorkerProcess
from tests.unmounting import unmount

MIB = 1 << 20
ODD = 5 * MIB + 3 * 4096 + 512
"""A size that ends inside a chunk, and inside a part for 512-byte sectors."""


@pytest.fixture
def source(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    size = ODD // request.param * request.param
    with loop_device(tmp_path / "disk", size, request.param) as path:
        yield path


# -- opening ------------------------------------------------------------------------------------------


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_origin(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="neither"):
        open_origin(str(tmp_path))
    with pytest.raises(UsageError, match="neither"):
        open_origin("/dev/null")
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty"):
        open_origin(str(tmp_path / "empty"))


def test_a_file_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    origin = open_origin(str(path))
    with pytest.raises(BusyError, match=str(path)):
        open_origin(str(path))
    origin.close()
    open_origin(str(path)).close()


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_a_file_behind_a_loop_device_is_refused(tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk", MIB) as device, pytest.raises(BusyError, match=Path(device).name):
        open_origin(str(tmp_path / "disk"))


@pytest.mark.root
@pytest.mark.tool("losetup", "mkfs.ext4")
@pytest.mark.parametrize("buffered", [False, True])
def test_a_mount_leaves_its_mark(tmp_path: Path, buffered: bool) -> None:
    with loop_device(tmp_path / "disk", 8 * MIB) as device:
        def mark() -> bytes:
            origin = open_origin(device, buffered=buffered)
            try:
                return origin.fs_mark()
            finally:
                origin.close()

        assert mark() == NO_FS_MARK
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        before = mark()
        assert before == mark() != NO_FS_MARK
        (tmp_path / "mnt").mkdir()
        subprocess.run(["mount", device, tmp_path / "mnt"], check=True)
        unmount(tmp_path / "mnt")
        assert NO_FS_MARK != mark() != before
    with contextlib.closing(open_origin(str(tmp_path / "disk"))) as origin:
        assert origin.fs_mark() == NO_FS_MARK


@pytest.mark.root
@pytest.mark.tool("losetup", "mkfs.ext4")
def test_a_worker_that_ends_notes_the_mark(short_dir: Path) -> None:
    with loop_device(short_dir / "disk", 8 * MIB) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        with WorkerProcess(short_dir, Path(device), buffered=False) as worker:
            worker.stop()
        with contextlib.closing(open_origin(device)) as origin, worker.map() as changes:
            assert changes.fs_mark == origin.fs_mark() != NO_FS_MARK


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_a_device_has_one_owner(device: str) -> None:
    origin = open_origin(device)
    assert origin.is_device
    with pytest.raises(BusyError) as caught:
        open_origin(device)
    assert caught.value.errno == errno.EBUSY
    assert device in str(caught.value)
    origin.close()
    open_origin(device).close()


@pytest.mark.root
@pytest.mark.tool("losetup", "mkfs.ext4")
def test_a_mounted_device_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with loop_device(tmp_path / "disk", 8 * MIB) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        if subprocess.run(["mount", device, tmp_path / "mnt"], check=False).returncode:
            pytest.skip("this host does not mount")
        try:
            with pytest.raises(BusyError, match=str(tmp_path / "mnt")):
                open_origin(device)
        finally:
            unmount(tmp_path / "mnt")
        open_origin(device).close()


# -- reading and writing ------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.tool("losetup")
@pytest.mark.parametrize("buffered", [False, True])
def test_a_device_under_a_snapshot(device: str, tmp_path: Path, source: random.Random, buffered: bool) -> None:
    """Both sector sizes, direct and buffered, requests of whole sectors up to the last one."""
    engine = Engine(tmp_path, Path(device), buffered=buffered)
    try:
        sector = engine.origin.sector
        size = engine.origin.size
        assert size == ODD // sector * sector or buffered
        unit = engine.export.minimum_block
        assert unit == (1 if buffered else sector)
        before = bytearray(source.randbytes(size))
        pwrite_many(engine.export, [(0, before)])
        engine.take(16)
        now = bytearray(before)
        for _ in range(60):
            start = source.randrange(size // unit) * unit
            length = min(source.randint(1, 300 << 10 if unit == 1 else (300 << 10) // unit) * unit, size - start)
            change(engine, now, start, length, source)
        change(engine, now, size - unit, unit, source)
        assert pread(engine.export, 0, size) == now
        assert engine.image is not None
        assert pread(engine.image, 0, size) == before
        assert not is_corrupted(engine.image)
    finally:
        engine.close()


def change(engine: Engine, now: bytearray, start: int, length: int, source: random.Random) -> None:
    """Write, zero or discard a range of the origin, and of what it should hold."""
    kind = source.randrange(4)
    if kind == 0:
        for _ in engine.export.write_zeroes(start, length, punch=source.random() < 0.5, fast=False):
            pass
        now[start : start + length] = bytes(length)
    elif kind == 1:
        for _ in engine.export.trim(start, length):
            pass
        now[start : start + length] = pread(engine.export, start, length)
    else:
        piece = source.randbytes(length)
        pwrite_many(engine.export, [(start, piece)], source.choice([0, 28]))
        now[start : start + length] = piece


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_a_worker_serves_a_device(short_dir: Path, device: str, source: random.Random) -> None:
    with WorkerProcess(short_dir, Path(device), buffered=False) as worker, worker.client() as client:
        before = source.randbytes(client.size)
        client.pwrite(0, before)
        worker.take()
        client.pwrite(0, before[::-1])
        client.trim(0, client.size)
        client.flush()
        with worker.image() as image:
            assert pread(image, 0, client.size) == before
        worker.drop()
        worker.stop()
        worker.start(continuity=False)
        assert not worker.control.do("info")["opening"]["fresh"]


def test_batches_keep_their_order_where_they_overlap(tmp_path: Path) -> None:
    path = tmp_path / "origin"
    path.write_bytes(bytes(4 * MIB))
    engine = Engine(tmp_path, path)
    try:
        for turn in range(100):
            writes = [(4096 * (step % 3), bytes([turn, step]) * 8192) for step in range(24)]
            expected = bytearray(pread(engine.export, 0, MIB))
            for offset, piece in writes:
                expected[offset : offset + len(piece)] = piece
            pwrite_many(engine.export, writes)
            assert pread(engine.export, 0, MIB) == expected
    finally:
        engine.close()


@pytest.mark.parametrize("buffered", [False, True])
def test_a_batch_of_any_ranges_is_read_right(tmp_path: Path, source: random.Random, buffered: bool) -> None:
    path = tmp_path / "origin"
    contents = source.randbytes(MIB + 77)
    path.write_bytes(contents)
    engine = Engine(tmp_path, path, buffered=buffered)
    try:
        for _ in range(30):
            ranges = []
            for _ in range(source.randint(1, 40)):
                start = source.randrange(len(contents))
                ranges.append((start, min(source.choice([1, 511, 4096, 65536]), len(contents) - start)))
            got = pread_many(engine.export, ranges)
            assert got == [contents[start : start + length] for start, length in ranges]
    finally:
        engine.close()


def test_an_origin_that_ends_early_is_an_error_and_corrupts_nothing_else(tmp_path: Path) -> None:
    """Cut by another program: reads behind the end fail, the snapshot of what is gone is corrupted."""
    path = tmp_path / "origin"
    path.write_bytes(os.urandom(MIB))
    engine = Engine(tmp_path, path)
    try:
        engine.take(16)
        os.truncate(path, MIB // 2)
        with pytest.raises(OSError) as caught:
            pread(engine.export, MIB - 10, 10)
        assert caught.value.errno == errno.EIO
        pwrite_many(engine.export, [(MIB - 4096, bytes(4096))])
        assert engine.failures == [errno.EIO]
        assert engine.image is not None
        assert is_corrupted(engine.image)
        assert pread(engine.export, MIB - 4096, 4096) == bytes(4096)
    finally:
        engine.close()
