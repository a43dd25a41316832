# SPDX-License-Identifier: Apache-2.0
"""A backup with scratch space behaves like a disk that holds the backup, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.serve import overlay
from stasis.backup.serve.cache import ChunkCache
from stasis.backup.serve.export import BackupExport
from stasis.backup.serve.overlay import OverlayExport, Scratch
from stasis.errors import NotFoundError, StorageError
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.client import Client
from tests.backup.fakes import CHUNK, FakeIndex, FakeReader, FakeStore, image
from tests.nbd.wire import ThreadedServer

SIZE = 12 * CHUNK + 700
BASE, DIRTY = "base:allocation", "qemu:dirty-bitmap:older"


class Disk:
    """The export, and the bytes that it should have."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.store = FakeStore()
        self.model = bytearray(image(SIZE, seed))
        self.written = bytearray(SIZE)
        self.index = FakeIndex(self.store, bytes(self.model))
        self.cache = ChunkCache(lambda: FakeReader(self.store), CHUNK, limit=8 * CHUNK)
        base = BackupExport("disk", self.index, self.cache, against=("older", self.index))
        self.scratch = Scratch(str(directory), SIZE)
        self.export = OverlayExport(base, self.scratch)

    def close(self) -> None:
        self.scratch.close()
        self.cache.close()

    def write(self, *writes: tuple[int, bytes]) -> None:
        with IoBuffer(sum(len(data) for _, data in writes)) as buffer:
            requests, position = [], 0
            for offset, data in writes:
                buffer.view[position : position + len(data)] = data
                requests.append((offset, len(data), position))
                position += len(data)
            self.export.write(buffer, requests)
        for offset, data in writes:
            self.change(offset, data)

    def change(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        self.written[offset : offset + len(data)] = b"\1" * len(data)

    def zero(self, offset: int, length: int, punch: bool) -> None:
        for _ in self.export.write_zeroes(offset, length, punch=punch, fast=False):
            pass
        self.change(offset, bytes(length))

    def read(self, offset: int, length: int) -> bytes:
        with IoBuffer(length) as buffer:
            self.export.read(buffer, [(offset, length, 0)])
            return bytes(buffer.view[:length])

    def check(self) -> None:
        assert self.read(0, SIZE) == self.model
        for offset, length, flags in self.extents(BASE):
            assert not flags or not any(self.model[offset : offset + length])
        for offset, length, flags in self.extents(DIRTY):
            assert flags or not any(self.written[offset : offset + length])

    def extents(self, context: str) -> Iterator[tuple[int, int, int]]:
        offset = 0
        while offset < SIZE:
            for length, flags in self.export.block_status(context, offset, SIZE - offset):
                assert length > 0
                yield offset, length, flags
                offset += length


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path, 5)
    yield disk
    disk.close()


OFFSET = st.integers(0, SIZE - 1) | st.sampled_from([0, 4096, CHUNK, SIZE - 700, SIZE // 4096 * 4096])
LENGTH = st.integers(1, 5 * CHUNK) | st.sampled_from([1, 512, 4096, CHUNK, SIZE])
CHANGES = st.tuples(st.sampled_from(["write", "zero", "punch"]), OFFSET, LENGTH, st.integers(1, 255))


@settings(max_examples=60)
@given(seed=st.integers(0, 2), changes=st.lists(CHANGES, max_size=12))
def test_any_history_reads_as_on_a_disk(tmp_path_factory: pytest.TempPathFactory, seed: int, changes: Any) -> None:
    disk = Disk(tmp_path_factory.getbasetemp(), seed)
    for kind, offset, length, byte in changes:
        length = min(length, SIZE - offset)
        if kind == "write":
            disk.write((offset, bytes((byte,)) * length))
        else:
            disk.zero(offset, length, punch=kind == "punch")
        at = max(0, offset - 5000)
        assert disk.read(at, min(length + 10000, SIZE - at)) == disk.model[at : min(at + length + 10000, SIZE)]
    disk.check()
    disk.close()


def test_writes_of_one_batch_that_overlap_apply_in_order(disk: Disk) -> None:
    disk.write((100, b"a" * 9000), (4000, b"b" * 200), (4100, b"c"))
    disk.check()


def test_only_the_blocks_that_are_cut_are_read_from_the_backup(disk: Disk) -> None:
    disk.write((0, b"x" * CHUNK))
    assert not disk.store.fetched
    disk.write((3 * CHUNK + 10, b"y" * (CHUNK - 10)))
    assert set(disk.store.fetched) <= {disk.index.name(3)}


def test_scratch_takes_space_for_what_is_written_only_and_trim_gives_it_back(disk: Disk) -> None:
    before = os.fstat(disk.scratch.fd).st_blocks
    disk.write((0, b"x" * 8 * CHUNK))
    full = os.fstat(disk.scratch.fd).st_blocks
    assert full * 512 >= 8 * CHUNK
    for _ in disk.export.trim(0, 8 * CHUNK):
        pass
    disk.change(0, bytes(8 * CHUNK))
    assert os.fstat(disk.scratch.fd).st_blocks < full - before
    disk.check()


def test_file_system_without_holes_gets_zeroes_written(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(overlay.files, "punch_hole", refuse)
    disk.write((0, b"x" * 3 * CHUNK))
    disk.zero(10, 2 * CHUNK, punch=True)
    disk.write((4096, b"y"))
    disk.check()


def test_full_scratch_fails_the_write_and_no_other(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def full(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 5 * CHUNK:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, buffers, offset)

    disk.write((0, b"a" * 100))
    monkeypatch.setattr(overlay.os, "pwritev", full)
    with pytest.raises(OSError) as caught:
        disk.write((5 * CHUNK, b"b" * 100))
    assert caught.value.errno == errno.ENOSPC
    disk.check()


def test_several_clients_see_each_others_writes(disk: Disk, short_dir: Path) -> None:
    with (
        ThreadedServer(short_dir / "s", [disk.export]) as server,
        Client.connect(server.uri()) as one,
        Client.connect(server.uri()) as other,
    ):
        assert not one.read_only
        one.pwrite(1000, b"one" * 5000, fua=True)
        assert other.pread(1000, 15000) == b"one" * 5000
        other.trim(0, 3 * CHUNK)
        other.write_zeroes(5 * CHUNK + 1, CHUNK)
        other.flush()
        assert one.pread(0, 3 * CHUNK) == bytes(3 * CHUNK)
        assert one.pread(5 * CHUNK, 2 * CHUNK) == (
            disk.model[5 * CHUNK : 5 * CHUNK + 1] + bytes(CHUNK) + disk.model[6 * CHUNK + 1 : 7 * CHUNK]
        )


def test_directory_that_cannot_hold_it_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no directory"):
        Scratch(str(tmp_path / "none"), 4096)
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError, match="file is no directory"):
        Scratch(str(tmp_path / "file"), 4096)
    with pytest.raises(StorageError, match="holds no file of"):
        Scratch(str(tmp_path), 1 << 62)


def test_nothing_has_a_name(disk: Disk, tmp_path: Path) -> None:
    disk.write((0, b"a" * SIZE))
    assert list(tmp_path.iterdir()) == []
