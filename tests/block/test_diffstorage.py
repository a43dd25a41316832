# SPDX-License-Identifier: Apache-2.0
"""Difference storage of every kind: space is given out once, up to the limit, and nobody else reads it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import stasis
from stasis.block.diffstorage import LARGEST_LEASE, DiffStorage, private_descriptor
from stasis.block.settings import PART_SIZE, Settings
from stasis.errors import BusyError, NotFoundError, PermissionDeniedError, StorageError
from stasis.linux import files
from tests.block.loops import loop_device

MIB = 1 << 20
PORTION = MIB
SETTINGS = replace(Settings(), diff_storage_minimum=PORTION)

Make = Callable[..., DiffStorage]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Create a storage with small portions."""
    made: list[DiffStorage] = []

    def call(target: str | int, **options: object) -> DiffStorage:
        made.append(DiffStorage.create(target, tmp_path / "header", SETTINGS, **options))  # type: ignore[arg-type]
        return made[-1]

    yield call
    for storage in made:
        storage.close()


def workers_view(storage: DiffStorage, header: Path) -> DiffStorage:
    """The same storage as one more worker opens it."""
    return DiffStorage(private_descriptor(storage.fd), header)


def fill_up(storage: DiffStorage, length: int) -> list[tuple[int, int]]:
    """Take everything, growing as a worker does."""
    taken: list[tuple[int, int]] = []
    while True:
        try:
            taken += storage.reserve(length)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return taken
        growth = storage.request_growth() if storage.is_low() else None
        if growth is not None and growth[1] > growth[0]:
            storage.grow(growth[0], growth[1])


def disjoint(extents: list[tuple[int, int]]) -> bool:
    ordered = sorted(extents)
    return all(left[0] + left[1] <= right[0] for left, right in itertools.pairwise(ordered))


# -- kinds --------------------------------------------------------------------------------------------


def test_a_directory_holds_an_unnamed_private_file(make: Make, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    storage = make(str(place), limit=4 * MIB)
    info = os.fstat(storage.fd)
    assert list(place.iterdir()) == []
    assert (info.st_nlink, stat.S_IMODE(info.st_mode)) == (0, 0o600)
    assert info.st_blocks * 512 >= PORTION
    assert storage.fill().kind == "directory"


def test_a_new_file_is_private_exclusive_and_removed(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "new"
    storage = make(str(path), limit=4 * MIB)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(BusyError):
        make(str(path), limit=4 * MIB)
    storage.dispose(str(path))
    assert not path.exists()


def test_an_existing_file_is_kept_and_cleared(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"")
    path.chmod(0o644)
    storage = make(str(path), limit=4 * MIB)
    ((offset, length),) = storage.reserve(PART_SIZE)
    os.pwrite(storage.fd, b"secret" * 600, offset)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    storage.dispose(str(path))
    assert b"secret" not in path.read_bytes()
    assert length == PART_SIZE


def test_memory_is_sealed_against_shrinking(make: Make) -> None:
    storage = make("memory", limit=4 * MIB)
    assert fcntl.fcntl(storage.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(storage.fd, 0)


def test_a_descriptor_is_adopted(make: Make, tmp_path: Path) -> None:
    fd = files.open_unnamed(str(tmp_path))
    try:
        storage = make(fd, limit=4 * MIB)
        assert os.fstat(storage.fd).st_ino == os.fstat(fd).st_ino
    finally:
        os.close(fd)
    assert storage.reserve(PART_SIZE)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_a_descriptor_must_be_read_and_written(make: Make, tmp_path: Path, flags: int) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", flags)
    try:
        with pytest.raises(StorageError, match="reading and writing"):
            make(fd, limit=4 * MIB)
    finally:
        os.close(fd)


def test_a_pipe_is_no_storage(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="no file, directory or block device"):
        make(str(tmp_path / "fifo"), limit=4 * MIB)


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_a_block_device_is_used_alone(tmp_path: Path) -> None:
    with (
        loop_device(tmp_path / "disk", 3 * MIB) as device,
        closing(DiffStorage.create(device, tmp_path / "header", SETTINGS)) as storage,
    ):
        assert (storage.fill().kind, storage.fill().limit) == ("device", 3 * MIB)
        with pytest.raises(BusyError):
            DiffStorage.create(device, tmp_path / "another", SETTINGS)
        taken = fill_up(storage, PART_SIZE)
        assert max(offset + length for offset, length in taken) == 3 * MIB


def test_a_limit_below_one_portion_is_the_portion(make: Make, tmp_path: Path) -> None:
    storage = make(str(tmp_path), limit=PORTION // 4)
    assert (storage.fill().portion, storage.fill().capacity) == (PORTION // 4, PORTION // 4)
    taken = fill_up(storage, PART_SIZE)
    assert max(offset + length for offset, length in taken) == PORTION // 4


# -- refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused_and_nothing_is_left(make: Make, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too small") as caught:
        make(str(tmp_path / "new"), limit=15 * PART_SIZE)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(NotFoundError):
        make(str(tmp_path / "no" / "where"), limit=4 * MIB)
    (tmp_path / "large").write_bytes(bytes(5 * MIB))
    with pytest.raises(StorageError, match="more than the limit"):
        make(str(tmp_path / "large"), limit=4 * MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def test_the_origin_itself_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "origin"
    path.write_bytes(bytes(100))
    with pytest.raises(StorageError, match="a device of the snapshot itself") as caught:
        make(str(path), limit=4 * MIB, origins=[path.stat()])
    assert caught.value.errno == errno.EBUSY
    assert path.read_bytes() == bytes(100)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionDeniedError):
        make(str(tmp_path / "closed" / "file"), limit=4 * MIB)


@pytest.mark.parametrize(("code", "text"), [(errno.EOPNOTSUPP, "no fallocate"), (errno.ENOSPC, "cannot hold")])
def test_a_file_system_that_cannot_reserve_is_told_at_create(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    def allocate(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "allocate", allocate)
    with pytest.raises(StorageError, match=text) as caught:
        make(str(tmp_path / "new"), limit=4 * MIB)
    assert caught.value.errno == code
    assert not (tmp_path / "new").exists()


# -- space --------------------------------------------------------------------------------------------


def test_growth_by_portions_up_to_the_limit(make: Make, tmp_path: Path) -> None:
    storage = make(str(tmp_path), limit=4 * MIB)
    assert storage.fill().requested == PORTION
    grown = []
    for _ in range(4 * MIB // PART_SIZE - 1):
        storage.reserve(PART_SIZE)
        if storage.is_low() and (growth := storage.request_growth()) is not None:
            grown.append(growth)
            if growth[1] > growth[0]:
                storage.grow(growth[0], growth[1])
    steps = [(old // MIB, new // MIB) for old, new, limit in grown if limit == 4 * MIB]
    assert steps == [(1, 2), (2, 3), (3, 4), (4, 4)]
    assert storage.fill().no_space
    assert os.fstat(storage.fd).st_size == 4 * MIB


@pytest.mark.parametrize("length", [PART_SIZE, 3 * PART_SIZE, 64 << 10])
def test_full_exactly_at_the_limit(make: Make, length: int) -> None:
    storage = make("memory", limit=3 * MIB + PART_SIZE)
    taken = fill_up(storage, length)
    used = sum(size for _, size in taken)
    assert disjoint(taken)
    assert min(offset for offset, _ in taken) == PART_SIZE
    assert 3 * MIB - length < used <= 3 * MIB


def test_a_request_larger_than_what_is_left_of_a_portion_grows_it(make: Make) -> None:
    storage = make("memory", limit=16 * MIB)
    assert sum(length for _, length in storage.reserve(5 * MIB)) == 5 * MIB


def test_one_device_cannot_starve_another(make: Make, tmp_path: Path) -> None:
    """One worker leased everything there was; the growth that it will ask for is not there yet."""
    storage = make("memory", limit=64 * LARGEST_LEASE)
    other = workers_view(storage, tmp_path / "header")
    first = storage.reserve(PART_SIZE)
    second = other.reserve(PART_SIZE)
    assert disjoint(first + second)
    other.close()


def test_no_space_is_told_once(make: Make) -> None:
    storage = make("memory", limit=PORTION)
    storage.reserve(PORTION - PART_SIZE)
    assert storage.is_low()
    assert storage.request_growth() == (PORTION, PORTION, PORTION)
    assert storage.request_growth() is None
    assert not storage.is_low()


@settings(suppress_health_check=list(HealthCheck), max_examples=50)
@given(requests=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100)), max_size=100))
def test_workers_never_get_the_same_space(tmp_path: Path, requests: list[tuple[int, int]]) -> None:
    header = tmp_path / "header"
    views = [DiffStorage.create("memory", header, SETTINGS, limit=8 * MIB)]
    views += [workers_view(views[0], header) for _ in range(2)]
    taken: list[tuple[int, int]] = []
    try:
        for who, parts in requests:
            try:
                got = views[who].reserve(parts * PART_SIZE)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                continue
            assert sum(length for _, length in got) == parts * PART_SIZE
            taken += got
    finally:
        for view in views:
            view.close()
    assert disjoint(taken)
    assert all(offset >= PART_SIZE and offset + length <= 8 * MIB for offset, length in taken)


RESERVER = """
import os, sys
from pathlib import Path
from stasis.block.diffstorage import DiffStorage, private_descriptor
storage = DiffStorage(private_descriptor(int(sys.argv[1])), Path(sys.argv[2]))
try:
    while True:
        for offset, length in storage.reserve(12288):
            print(offset, length)
except OSError:
    pass
"""


def test_two_processes_at_once_get_different_space(make: Make, tmp_path: Path) -> None:
    storage = make(str(tmp_path), limit=32 * MIB)
    environment = {**os.environ, "PYTHONPATH": str(Path(stasis.__file__).parents[1])}
    command = [sys.executable, "-c", RESERVER, str(storage.fd), str(tmp_path / "header")]
    both = [
        subprocess.Popen(command, pass_fds=[storage.fd], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    taken = []
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        taken += [(int(first), int(second)) for first, second in (line.split() for line in output.splitlines())]
    assert disjoint(taken)
    assert 31 * MIB <= sum(length for _, length in taken) < 32 * MIB


def test_growth_in_a_thread_disturbs_no_reservation(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a worker's loop stands while its background thread comes and goes."""
    storage = make(str(tmp_path), limit=64 * MIB)
    inside, go_on = threading.Event(), threading.Event()
    allocate = files.allocate

    def slow(fd: int, offset: int, length: int) -> None:
        inside.set()
        go_on.wait(30)
        allocate(fd, offset, length)

    storage.reserve(PORTION - PART_SIZE)
    monkeypatch.setattr(files, "allocate", slow)
    taken: list[tuple[int, int]] = []
    loop = threading.Thread(target=lambda: taken.extend(storage.reserve(PART_SIZE)))
    loop.start()
    assert inside.wait(30)
    growth = threading.Thread(target=storage.request_growth)
    growth.start()
    other = workers_view(storage, tmp_path / "header")
    second = threading.Thread(target=lambda: taken.extend(other.reserve(PART_SIZE)))
    second.start()
    growth.join(0.2)
    second.join(0.2)
    go_on.set()
    for thread in (loop, growth, second):
        thread.join(30)
    assert len(taken) == 2
    assert disjoint(taken)
    other.close()


def test_a_full_disk_during_growth_lowers_the_limit(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make(str(tmp_path), limit=8 * MIB)
    storage.reserve(PORTION // 2)
    growth = storage.request_growth()
    assert growth is not None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "allocate", full)
    with pytest.raises(OSError, match="No space left"):
        storage.grow(growth[0], growth[1])
    fill = storage.fill()
    assert fill.limit == fill.requested == max(fill.capacity, fill.filled)
    taken = fill_up(storage, PART_SIZE)
    assert all(offset + length <= fill.limit for offset, length in taken)


def test_a_failed_writeback_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = make("memory", limit=4 * MIB)
    storage.check()

    def failed(_fd: int) -> None:
        raise OSError(errno.EIO, "writeback failed")

    monkeypatch.setattr(files, "writeback_error", failed)
    with pytest.raises(OSError, match="writeback failed"):
        storage.check()


def test_header_is_private(make: Make, tmp_path: Path) -> None:
    make("memory", limit=4 * MIB)
    assert stat.S_IMODE((tmp_path / "header").stat().st_mode) == 0o600
