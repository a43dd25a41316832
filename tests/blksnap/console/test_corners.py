# SPDX-License-Identifier: Apache-2.0
"""What hosts, file systems and daemons make of the tool: no nodes, no place for a file, a map that cannot be read."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stasis.cli.blksnap import devices, location, maps, snapshots, version
from stasis.cli.blksnap.session import Session
from stasis.daemon.model import Device, Snapshot, Storage
from stasis.errors import BusyError, DaemonError, GenerationError, StasisError, UsageError
from stasis.linux import fiemap
from stasis.nbd.client import Client
from tests.blksnap.console.conftest import Tool
from tests.daemon.helpers import await_true

MIB = 1 << 20
START = 8192
"""First sector of a partition."""


@pytest.fixture
def disk(short_dir: Path) -> Path:
    path = short_dir / "disk.img"
    path.write_bytes(os.urandom(2 * MIB))
    (short_dir / "diff").mkdir()
    return path


def test_a_host_without_nodes_has_uris(blksnap: Tool, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No front end is found on an empty path; everything else works."""
    monkeypatch.setenv("PATH", "/nonexistent")
    attached = json.loads(blksnap.ok("attach", "-d", disk, "-j"))
    if attached["node"] is not None:
        pytest.skip("the kernel of this host has an NBD client of its own")
    uuid = blksnap.ok("snapshot_create", "-d", disk, "-f", disk.parent / "diff", "-l", "4M")
    blksnap.ok("snapshot_take", "-i", uuid)
    image = blksnap.ok("snapshot_info", "-d", disk, "--field", "image")
    before = disk.read_bytes()
    with Client.connect(attached["uri"]) as device:
        device.pwrite(0, bytes(MIB))
    with Client.connect(image) as client:
        assert client.pread(0, 2 * MIB) == before


@pytest.mark.root
def test_a_disk_in_use_is_not_attached(blksnap: Tool, disk: Path) -> None:
    node = subprocess.run(["losetup", "-f", "--show", disk], check=True, capture_output=True, text=True).stdout.strip()
    try:
        blksnap.replay(
            """
$ attach -d $DISK
! Failed to attach filter to the block device: Device or resource busy
""",
            {"DISK": str(disk)},
        )
    finally:
        subprocess.run(["losetup", "-d", node], check=True)
    assert blksnap.ok("attach", "-d", disk) == "Attached successfully"


@pytest.mark.root
def test_a_block_device_and_its_node_are_one_device(blksnap: Tool, disk: Path) -> None:
    loop = subprocess.run(["losetup", "-f", "--show", disk], check=True, capture_output=True, text=True).stdout.strip()
    try:
        node = json.loads(blksnap.ok("attach", "-d", loop, "-j"))["node"] or loop
        numbers = [os.stat(path).st_rdev for path in (loop, node)]
        assert blksnap.ok("attach", "-d", node) == "Already was attached"
        assert blksnap.ok("cbtinfo", "-d", node) == blksnap.ok("cbtinfo", "-d", loop)
        shown = json.loads(blksnap.ok("tracker_collect", "-j"))["devices"]
        assert [one["number"] for one in shown] == [f"{os.major(numbers[0])}:{os.minor(numbers[0])}"]
        assert blksnap.ok("detach", "-d", node) == ""
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@pytest.mark.expects_errors("is not served")
def test_a_device_that_could_not_be_served_is_tried_again(blksnap: Tool, disk: Path) -> None:
    """And is not called attached while it is not."""
    blksnap.ok("attach", "-d", disk)
    blksnap.stasis("daemon", "stop", "--force")
    away = disk.rename(disk.with_suffix(".away"))
    assert [one["state"] for one in blksnap.stasis.json("device", "list")] == ["failed"]
    away.rename(disk)
    os.truncate(disk, 0)
    said = blksnap("attach", "-d", disk)
    assert (said.code, said.out) == (1, ""), said
    assert said.err.startswith("Failed to attach filter to the block device: ")
    os.truncate(disk, 2 * MIB)
    assert blksnap.ok("attach", "-d", disk) == "Already was attached"
    assert [one["state"] for one in blksnap.stasis.json("device", "list")] == ["serving"]


# -- places of files ----------------------------------------------------------------------------------


def _extents(*found: tuple[int, int, int]) -> Callable[..., list[fiemap.FileExtent]]:
    return lambda *_, **__: [fiemap.FileExtent(0, physical, length, flags) for physical, length, flags in found]


@pytest.mark.parametrize(
    "extent",
    [
        (4096, 100, 0),
        (100, 512, 0),
        (0, 4096, fiemap.FIEMAP_EXTENT_DELALLOC | fiemap.FIEMAP_EXTENT_UNKNOWN),
        (4096, 512, fiemap.FIEMAP_EXTENT_DATA_INLINE | fiemap.FIEMAP_EXTENT_NOT_ALIGNED),
        (4096, 4096, fiemap.FIEMAP_EXTENT_ENCODED),
    ],
)
def test_an_extent_without_a_place_is_refused(
    disk: Path, monkeypatch: pytest.MonkeyPatch, extent: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(fiemap, "extents", _extents((4096, 4096, 0), extent))
    with pytest.raises(StasisError) as caught:
        location.of_file(str(disk))
    assert caught.value.message == "File location is not ordered by sector size.: Invalid argument"


def test_a_file_lies_where_its_extents_are(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fiemap, "extents", _extents((4096, 8192, 0), (1 << 40, 512, fiemap.FIEMAP_EXTENT_LAST)))
    found = location.of_file(str(disk))
    assert found.ranges == [(8, 16), (1 << 31, 1)]
    number = disk.stat().st_dev
    assert found.node == f"/dev/block/{os.major(number)}:{os.minor(number)}"


@pytest.mark.root
@pytest.mark.tool("mkfs.ext4", "addpart", "delpart")
def test_a_file_on_a_partition_is_marked_on_its_disk(blksnap: Tool, disk: Path, short_dir: Path) -> None:
    os.truncate(disk, 24 * MIB)
    node = json.loads(blksnap.ok("attach", "-d", disk, "-j"))["node"]
    if node is None:
        pytest.skip("this host has no way to make a node")
    subprocess.run(["addpart", node, "1", str(START), "32768"], check=True)  # not every kernel reads tables
    data = os.urandom(300_000)
    partition = short_dir / "partition"
    major, minor = Path(f"/sys/class/block/{os.path.basename(node)}p1/dev").read_text().split(":")
    os.mknod(partition, 0o600 | stat.S_IFBLK, os.makedev(int(major), int(minor)))  # not every host has one in /dev
    (short_dir / "mnt").mkdir()
    subprocess.run(["mkfs.ext4", "-q", partition], check=True)
    subprocess.run(["mount", partition, short_dir / "mnt"], check=True)
    try:
        (short_dir / "mnt" / "file").write_bytes(data)
        uuid = blksnap.ok("snapshot_create", "-d", disk, "-f", short_dir / "diff", "-l", "32M")
        frozen = json.loads(blksnap.ok("snapshot_take", "-i", uuid, "-j"))["frozen"]
        assert frozen == [str(short_dir / "mnt")]  # blksnap takes a whole disk without its partitions' file systems
        blksnap.ok("snapshot_destroy", "-i", uuid)
        uuid = blksnap.ok("snapshot_create", "-d", disk, "-f", short_dir / "diff", "-l", "32M")
        blksnap.ok("snapshot_take", "-i", uuid)
        marked = json.loads(blksnap.ok("markdirtyblock", "-f", short_dir / "mnt" / "file", "-j"))
        blksnap.ok("readcbtmap", "-d", disk, "-f", short_dir / "map")
    finally:
        subprocess.run(["umount", short_dir / "mnt"], check=True)
        # Mount namespaces of tests that run beside this one may have it for a while.
        await_true(lambda: subprocess.run(["delpart", node, "1"]).returncode == 0)
    blocks = {
        block
        for one in marked["ranges"]
        for block in range((START + one["sector"]) // 128, (START + one["sector"] + one["count"] - 1) // 128 + 1)
    }
    numbers = (short_dir / "map").read_bytes()
    assert {block for block, number in enumerate(numbers) if number == 2} >= blocks
    assert _contents(disk.read_bytes(), marked["ranges"])[: len(data)] == data


def _contents(image: bytes, ranges: list[dict[str, int]]) -> bytes:
    """What lies in sectors of the partition."""
    starts = [((START + one["sector"]) * 512, one["count"] * 512) for one in ranges]
    return b"".join(image[start : start + length] for start, length in starts)


# -- a daemon that fails ------------------------------------------------------------------------------


class _Failing:
    """A connection whose every call fails."""

    def __init__(self, error: StasisError) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise self.error

        return fail


@pytest.mark.parametrize(
    ("command", "values", "text"),
    [
        (version.version, {}, "Failed to get version.: Connection refused"),
        (snapshots.snapshot_collect, {}, "Failed to get list of active snapshots: Connection refused"),
        (snapshots.snapshot_destroy, {"id": ["x"]}, "Failed to destroy snapshot.: Connection refused"),
        (snapshots.snapshot_take, {"id": ["x"]}, "Failed to take snapshot: Connection refused"),
        (maps.tracker_collect, {}, "Failed to collect block devices with change tracking: Connection refused"),
    ],
)
def test_a_daemon_that_goes_away(command: Callable[[Session], None], values: dict[str, list[str]], text: str) -> None:
    session = Session()
    session.values = values
    session._client = _Failing(DaemonError("the daemon ended the connection"))  # type: ignore[assignment]
    with pytest.raises(StasisError) as caught:
        command(session)
    assert caught.value.message == text
    assert "the daemon ended the connection" in caught.value.hint


class _Module:
    """A daemon in which a kernel module tracks the device at `path`."""

    def __init__(self, path: str) -> None:
        self.path, self.attached = path, True
        self.created: list[tuple[str, list[str]]] = []
        self.added: list[str] = []

    def devices(self) -> list[Device]:
        return [self._device()] if self.attached else []

    def _device(self) -> Device:
        return Device("one", self.path, f"file://{self.path}", 1, "tracked", node=self.path, driver="blksnap")

    def attach(self, path: str, *, name: str, kernel: bool = False, driver: str = "stasis") -> Device:
        if driver == "stasis":
            raise BusyError(f"{path} is in use: mounted on /srv")
        self.attached = True
        return self._device()

    def create_snapshot(self, storage: str, devices: list[str], *, limit: int) -> Snapshot:
        self.created.append((storage, devices))
        return Snapshot("u", "created", 0, 0.0, Storage(storage, "file"))

    def add(self, uuid: str, device: str) -> None:
        self.added.append(device)


def test_a_snapshot_of_a_device_of_a_kernel_module_is_that_modules(disk: Path) -> None:
    session = Session()
    session.values = {"device": [str(disk), str(disk)], "file": [str(disk.parent)], "limit": ["1G"]}
    session._client = module = _Module(str(disk))  # type: ignore[assignment]
    snapshots.snapshot_create(session)
    assert (module.created, module.added) == ([(str(disk.parent), ["one"])], ["one"])


def test_a_disk_in_use_is_tracked_by_the_module_where_there_is_one(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session()
    session.values = {"device": [str(disk)]}
    session._client = module = _Module(str(disk))  # type: ignore[assignment]
    module.attached = False
    devices.attach(session)
    devices.attach(session)
    assert capsys.readouterr().out == "Attached successfully\nAlready was attached\n"


class _Maps:
    """A device whose map misses changes, or whose snapshots come and go."""

    def __init__(self, *, broken: bool, held: bool = False) -> None:
        self.broken, self.held = broken, held

    def control(self, name: str, command: str) -> dict[str, Any]:
        held = {"held_generation": "g", "held_change_number": 3} if self.held else {}
        return {"block_size": 65536, "block_count": 4, "capacity": 1 << 18, "generation": "g", "change_number": 3,
                "broken": self.broken, **held}  # fmt: skip

    def read_map(self, name: str, *, held: bool) -> bytes:
        if self.held:
            raise UsageError("no snapshot holds the map")
        return bytes((0, 2, 3, 4))


class _Device:
    name = "disk"


def test_a_map_that_misses_changes_is_not_given_out() -> None:
    with pytest.raises(StasisError) as caught:
        maps._read(_Maps(broken=True), _Device())  # type: ignore[arg-type]
    assert caught.value.errno == errno.EFAULT


def test_a_map_whose_snapshot_goes_is_read_again_and_not_for_ever() -> None:
    with pytest.raises(StasisError) as caught:
        maps._read(_Maps(broken=False, held=True), _Device())  # type: ignore[arg-type]
    assert caught.value.errno == errno.EAGAIN


def test_without_a_snapshot_no_block_has_a_number_above_the_last() -> None:
    """A block that was written since counts as changed before the last snapshot too: once too often, never missed."""
    assert maps._read(_Maps(broken=False), _Device()) == bytes((0, 2, 3, 3))  # type: ignore[arg-type]


def test_an_error_without_a_number_keeps_its_words() -> None:
    session = Session()
    session._client = _Failing(GenerationError("nothing is known", errno=0))  # type: ignore[assignment]
    with pytest.raises(StasisError) as caught:
        version.version(session)
    assert caught.value.message == "Failed to get version.: nothing is known"
