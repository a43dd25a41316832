# SPDX-License-Identifier: Apache-2.0
"""Tracers in a real daemon with real workers: what they survive, what a status file says, groups at one instant."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stasis as api
from stasis.datto.cowreader import CowReader
from stasis.errors import StasisError
from stasis.nbd.client import Client as NbdClient
from tests.daemon.helpers import await_true, kill, read, write
from tests.runner import Stasis

SIZE = (4 << 20) + 512


@pytest.fixture
def client(stasis: Stasis) -> Iterator[api.Client]:
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        yield client


def _disk(client: api.Client, directory: Path, name: str = "disk") -> Path:
    path = directory / name
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    client.attach(path)
    return path


def _uri(client: api.Client, name: str = "disk") -> str:
    return client.device(name).uri


def _image(stasis: Stasis, minor: int = 0) -> str:
    return f"nbd+unix:///datto{minor}?socket={stasis.run_dir}/nbd/datto{minor}.sock"


def _code(call: Callable[[], object]) -> int:
    try:
        call()
    except StasisError as error:
        return error.errno
    return 0


def _serves(client: api.Client, pid: int) -> bool:
    """Whether another worker than the one with this pid answers."""
    try:
        return client.device("disk").pid not in (None, pid) and bool(client.datto_info(0).uuid and _size(client))
    except (StasisError, OSError):
        return False


def _size(client: api.Client) -> int:
    return client.refresh("disk").size


@pytest.mark.expects_errors("died; starting it again")
def test_a_series_through_detach_daemon_restart_and_death(stasis: Stasis, client: api.Client, short_dir: Path) -> None:
    disk = _disk(client, short_dir)
    old = disk.read_bytes()
    client.datto_setup([(0, disk, short_dir / "cow0")])
    write(_uri(client), 5000, b"x" * 10000)
    client.detach("disk")
    assert client.datto_info(0).state_name == "dormant snapshot"
    client.attach(disk)
    assert client.datto_info(0).state == 3
    write(_uri(client), 100000, b"y")
    client.stop()
    await_true(lambda: stasis.daemon_pid() is None)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        assert (client.datto_info(0).state, client.datto_info(0).changed) == (3, 4)
        pid = client.device("disk").pid
        assert pid is not None
        kill(pid)
        await_true(lambda: _serves(client, pid))
        assert read(_image(stasis), 0, SIZE) == old
        client.datto_to_incremental(0)
        write(_uri(client), 200000, b"z")
        now = disk.read_bytes()
        client.datto_to_snapshot(0, short_dir / "cow1")
        write(_uri(client), 300000, b"later")
        assert read(_image(stasis), 0, SIZE) == now
        with CowReader(str(short_dir / "cow0"), SIZE) as reader:
            assert list(reader.extents()) == [(4096, 12288), (98304, 4096), (196608, 4096)]
        info = json.loads((stasis.run_dir / "datto-info").read_text())["devices"][0]
        assert (info["seq_id"], info["state"], info["cow_file"]) == (2, 3, str(short_dir / "cow1"))


def test_a_daemon_that_was_killed_finds_its_tracer(stasis: Stasis, client: api.Client, short_dir: Path) -> None:
    disk = _disk(client, short_dir)
    client.datto_setup([(2, disk, short_dir / "cow")])
    pid = stasis.daemon_pid()
    assert pid is not None
    kill(pid)
    write(_uri_of(stasis), 0, b"while no daemon runs")
    with api.connect(stasis.run_dir, stasis.state_dir) as again:
        assert (again.datto_info(2).state, again.datto_info(2).changed) == (3, 1)
        assert read(_image(stasis, 2), 0, 20) == bytes(range(20))


def _uri_of(stasis: Stasis) -> str:
    return f"nbd+unix:///disk?socket={stasis.run_dir}/nbd/disk.sock"


def test_reload_takes_a_file_up_that_nothing_was_written_behind(client: api.Client, short_dir: Path) -> None:
    disk = _disk(client, short_dir)
    client.datto_setup([(0, disk, short_dir / "cow")])
    assert _code(lambda: client.datto_reload(1, disk, short_dir / "cow", snapshot=True)) == errno.EINVAL
    client.detach("disk")
    client.datto_destroy(0)
    assert (short_dir / "cow").exists()
    client.datto_reload(1, disk, short_dir / "cow", snapshot=True)
    assert client.datto_info(1).state_name == "unverified snapshot"
    client.attach(disk)
    assert client.datto_info(1).state_name == "active snapshot"
    client.detach("disk")
    client.datto_destroy(1)
    client.attach(disk)  # from here on it may be written to without the file
    client.detach("disk")
    client.datto_reload(1, disk, short_dir / "cow", snapshot=True)
    client.attach(disk)
    assert (client.datto_info(1).state, client.datto_info(1).error) == (5, -errno.EINVAL)


def test_an_image_in_use_is_busy(stasis: Stasis, client: api.Client, short_dir: Path) -> None:
    disk = _disk(client, short_dir)
    client.datto_setup([(0, disk, short_dir / "cow")])
    with NbdClient.connect(_image(stasis), timeout=30) as reader:
        with pytest.raises(OSError):
            reader.pwrite(0, bytes(4096))
        assert _code(lambda: client.datto_to_incremental(0)) == errno.EBUSY
        assert _code(lambda: client.datto_destroy(0)) == errno.EBUSY
    await_true(lambda: _code(lambda: client.datto_destroy(0)) == 0)
    assert not (short_dir / "cow").exists()


@pytest.mark.parametrize(("cow", "number"), [
    (".", errno.EISDIR), ("none/cow", errno.ENOENT), ("letter", errno.EEXIST), ("disk", errno.EBUSY),
])
def test_a_cow_file_that_cannot_be_leaves_all_as_it_was(client: api.Client, short_dir: Path, cow: str,
                                                        number: int) -> None:
    disk = _disk(client, short_dir)
    (short_dir / "letter").write_text("dear")
    before = {path: path.stat().st_size for path in short_dir.iterdir() if path.is_file()}
    assert _code(lambda: client.datto_setup([(0, disk, short_dir / cow)])) == number
    assert {path: path.stat().st_size for path in short_dir.iterdir() if path.is_file()} == before
    assert client.datto_list() == []


def test_a_group_begins_at_one_instant(stasis: Stasis, client: api.Client, short_dir: Path) -> None:
    """A writer raises a number on one device and then on the other: no image has the second ahead of the first."""
    disks = [_disk(client, short_dir, name) for name in ("a", "b")]
    stop = threading.Event()
    writer = threading.Thread(target=_count_up, args=([_uri(client, name) for name in ("a", "b")], stop))
    writer.start()
    try:
        for round_ in range(3):
            client.datto_setup([(number, disk, short_dir / f"cow{number}{round_}")
                                for number, disk in enumerate(disks)])
            first, second = (int.from_bytes(read(_image(stasis, number), 0, 8), "little") for number in (0, 1))
            assert first - 1 <= second <= first
            for number in (0, 1):
                await_true(lambda number=number: _code(lambda: client.datto_destroy(number)) == 0)
    finally:
        stop.set()
        writer.join()


def _count_up(uris: list[str], stop: threading.Event) -> None:
    with NbdClient.connect(uris[0], timeout=30) as first, NbdClient.connect(uris[1], timeout=30) as second:
        for export in (first, second):
            export.pwrite(0, bytes(4096))
        number = 0
        while not stop.is_set():
            number += 1
            for export in (first, second):
                export.pwrite(0, number.to_bytes(8, "little").ljust(4096, b"\0"))


def test_a_full_cow_file_fails_the_tracer_and_says_so(stasis: Stasis, client: api.Client, short_dir: Path) -> None:
    disk = _disk(client, short_dir)
    client.datto_setup([(0, disk, short_dir / "cow")], fallocated_space=1)
    write(_uri(client), 0, bytes(3 << 20))
    await_true(lambda: client.datto_info(0).error == -errno.EFBIG)
    assert _code(lambda: client.datto_to_incremental(0)) == errno.EINVAL
    assert client.datto_list()[0].error == -errno.EFBIG
    assert json.loads((stasis.run_dir / "datto-info").read_text())["devices"][0]["error"] == -27
    assert not (short_dir / "cow").exists()
    client.datto_destroy(0)


def test_one_that_failed_while_no_daemon_ran_gives_way_to_the_next(stasis: Stasis, client: api.Client,
                                                                   short_dir: Path) -> None:
    disk = _disk(client, short_dir)
    client.datto_setup([(0, disk, short_dir / "cow")], fallocated_space=1)
    pid = stasis.daemon_pid()
    assert pid is not None
    kill(pid)
    write(_uri_of(stasis), 0, bytes(3 << 20))
    with api.connect(stasis.run_dir, stasis.state_dir) as again:
        assert again.datto_info(0).error == -errno.EFBIG
        again.datto_destroy(0)
        again.datto_setup([(0, disk, short_dir / "next")])
        assert again.datto_info(0).error == 0
