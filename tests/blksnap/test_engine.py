# SPDX-License-Identifier: Apache-2.0
"""Devices of a kernel module behave as served ones do, for the command line, the API, copies and backups.

The daemon runs in the test's own process, with the fake kernel under it; commands reach it through its socket.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stasis as api
from stasis.blksnap.drivers import Held
from stasis.blksnap.kernel import Kernel
from stasis.daemon import control
from stasis.daemon.main import Daemon
from stasis.daemon.paths import resolve
from stasis.daemon.recovery import recover
from stasis.errors import ExitCode
from tests.blksnap.conftest import MIB, Host
from tests.blksnap.fake_blksnap import CHUNK
from tests.blksnap.fake_datto import FakeDatto
from tests.blksnap.fake_kernel import FakeKernel
from tests.conftest import MODULE_NODES
from tests.daemon.helpers import await_true, read, write
from tests.runner import Stasis


class Service:
    """A daemon in this process."""

    def __init__(self, stasis: Stasis, kernel: Kernel) -> None:
        self.directories = resolve(stasis.run_dir, stasis.state_dir)
        self.directories.create()
        self.daemon = Daemon(self.directories, {}, kernel)
        recover(self.daemon.devices, self.daemon.snapshots)
        self.daemon.driven.recover()
        self._server = control.Server(self.directories.control_socket, self.daemon.engines, self.daemon.devices,
                                      self.daemon.stop)

    def end(self, *, keep: bool = False) -> None:
        self._server.close()
        self.daemon.keep_serving = keep
        self.daemon.shut_down()


@pytest.fixture
def start(stasis: Stasis) -> Iterator[Callable[[Kernel], Service]]:
    """Start a daemon; it ends with the test, if the test does not end it."""
    running: list[Service] = []

    def begin(kernel: Kernel) -> Service:
        running.append(Service(stasis, kernel))
        return running[-1]

    yield begin
    for service in running[-1:]:
        service.end()


@pytest.fixture
def client(newest: Host, start: Callable[[Kernel], Service], stasis: Stasis) -> Iterator[api.Client]:
    start(newest.kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as connected:
        yield connected


def _snapshot(client: api.Client, host: Host, *names: str, limit: int = 64 * MIB) -> api.Snapshot:
    return client.create_snapshot(host.directory / "storage", list(names) or ["sdb"], limit=limit, take=True)


def test_every_generation_is_driven_from_attach_to_detach(
    host: Host, start: Callable[[Kernel], Service], stasis: Stasis
) -> None:
    start(host.kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        device = client.attach(host.disk.path, driver="blksnap")
        assert (device.name, device.state, device.driver, device.size) == ("sdb", "tracked", "blksnap", 4 * MIB)
        assert device.uri == host.disk.path.as_uri()
        shown = _snapshot(client, host)
        before = host.disk.path.read_bytes()
        host.kernel.write(host.disk, MIB, b"new")
        assert read(shown.devices[0].uri or "", 0, 4 * MIB) == before
        client.destroy(shown.id)
        shown = _snapshot(client, host)
        assert client.changed_extents("sdb", 1, held=True) == [api.Extent(MIB, 65536)]
        client.destroy(shown.id)
        client.detach("sdb")
        assert client.devices() == []
    assert not host.module.trackers
    assert not host.module.snapshots
    assert [path.name for path in host.kernel.dev.iterdir() if "image" in path.name] == []


def test_commands_work_as_on_served_devices(
    newest: Host, start: Callable[[Kernel], Service], stasis: Stasis, short_dir: Path
) -> None:
    start(newest.kernel)
    assert stasis("device", "attach", newest.disk.path, "--driver", "blksnap") == newest.disk.path.as_uri()
    assert [device["driver"] for device in stasis.json("device", "list")] == ["blksnap"]
    assert "interface 6.15" in stasis("device", "show", "sdb")
    uuid = stasis("snapshot", "create", "--storage", short_dir / "storage", "--limit", "64M", "sdb", "--take")
    image = newest.disk.path.read_bytes()
    assert stasis.json("snapshot", "show", uuid)["devices"][0]["node"] == str(newest.kernel.dev / "blksnap-8-16")
    newest.kernel.write(newest.disk, 0, b"changed since")
    stasis("snapshot", "copy", uuid, "sdb", short_dir / "copy.img")
    assert (short_dir / "copy.img").read_bytes() == image
    stasis("snapshot", "destroy", uuid)
    uuid = stasis("snapshot", "create", "--storage", short_dir / "storage", "--limit", "64M", "sdb", "--take")
    assert stasis.json("map", "changed", "sdb", "--since", "1", "--held") == [{"offset": 0, "length": 65536}]
    info = stasis.json("map", "info", "sdb")
    assert (info["change_number"], info["held_change_number"]) == (2, 2)
    stasis("map", "mark", "sdb", "1M:1")
    assert stasis.json("map", "changed", "sdb", "--since", "1", "--held")[1:] == [{"offset": MIB, "length": 65536}]
    assert "in the snapshot" in stasis.fail(ExitCode.BUSY, "device", "detach", "sdb")
    stasis("device", "detach", "sdb", "--force", "--forget")
    assert stasis.json("snapshot", "list") == []


def test_a_backup_is_incremental(
    newest: Host, start: Callable[[Kernel], Service], stasis: Stasis, short_dir: Path
) -> None:
    start(newest.kernel)
    repo, storage = short_dir / "repo", short_dir / "storage"
    stasis("repo", "init", repo, "--no-encryption")
    stasis("device", "attach", newest.disk.path, "--driver", "blksnap")
    create = ("backup", "create", "--repo", repo, "--storage", storage, "--limit", "64M", newest.disk.path)
    stasis(*create)
    stasis(*create, "--dry-run")
    newest.kernel.write(newest.disk, 3 * MIB + 5, b"a change")
    stasis(*create)
    made = stasis.json("backup", "list", "--repo", repo)
    kinds = [(entry["kind"], entry["statistics"]["bytes_changed"]) for entry in made]
    assert [kind for kind, _ in kinds] == ["full", "incremental"]
    assert kinds[1][1] <= MIB
    stasis("backup", "restore", "--repo", repo, "latest", short_dir / "restored.img", "--device", "sdb")
    assert (short_dir / "restored.img").read_bytes() == newest.disk.path.read_bytes()
    assert not newest.module.snapshots


def test_dattobd_is_driven_by_the_same_commands(
    kernel: FakeKernel, start: Callable[[Kernel], Service], stasis: Stasis, short_dir: Path
) -> None:
    module = FakeDatto(kernel)
    kernel.load(module, "datto-ctl")
    disk = kernel.add_disk("sdb1", 4 * MIB, (8, 17))
    disk.mounted_on = short_dir / "mnt"
    disk.mounted_on.mkdir()
    first = start(kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        client.attach(disk.path, driver="dattobd")
        for number in (1, 2):
            made = client.create_snapshot(disk.mounted_on, ["sdb1"], limit=16 * MIB, take=True)
            assert made.devices[0].change_number == number
            image = disk.path.read_bytes()
            kernel.write(disk, number * MIB, b"written")
            assert read(made.devices[0].uri or "", 0, 4 * MIB) == image
            extents = client.changed_extents("sdb1", number - 1, held=True)
            assert extents == ([api.Extent(MIB, 65536)] if number == 2 else [])
            client.destroy(made.id)
        with pytest.raises(api.StorageError, match="no directory on"):
            client.create_snapshot("/proc", ["sdb1"])
    first.end()
    kernel.write(disk, 3 * MIB, b"while no daemon runs")
    start(kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        made = client.create_snapshot(disk.mounted_on, ["sdb1"], take=True)
        assert client.changed_extents("sdb1", 2, held=True) == [api.Extent(2 * MIB, 65536), api.Extent(3 * MIB, 65536)]
        module.break_down(module.minors[0], errno.EFBIG)
        assert client.snapshot(made.id).devices[0].error_code == -errno.EFBIG
        client.detach("sdb1", force=True)
    assert not module.minors


def test_overflow_reaches_watchers_and_marks_the_snapshot(client: api.Client, newest: Host) -> None:
    client.attach(newest.disk.path, driver="blksnap")
    shown = _snapshot(client, newest, limit=2 * MIB)
    for offset in range(0, 4 * MIB, CHUNK):
        newest.kernel.write(newest.disk, offset, b"x")
    seen: list[tuple[str, str, int]] = []
    while ("corrupted", "sdb", -errno.ENOSPC) not in seen:
        events = client.wait_events(shown.id, after=len(seen), timeout=30)
        assert events, "the event did not come"
        seen += [(event.event, event.device, event.error_code) for event in events]
    assert ("no_space", "", 0) in seen
    assert client.snapshot(shown.id).state == "corrupted"


def test_nobody_waits_any_more_when_a_snapshot_is_destroyed(client: api.Client, newest: Host) -> None:
    """Or the module would keep it, with its image, until that wait has ended: ten times later than asked for."""
    newest.module.hz = 100
    client.attach(newest.disk.path, driver="blksnap")
    shown = _snapshot(client, newest)
    image = Path(shown.devices[0].node or "")
    assert image.exists()
    client.destroy(shown.id)
    assert not image.exists()


def test_a_take_that_fails_leaves_nothing(client: api.Client, newest: Host) -> None:
    client.attach(newest.disk.path, driver="blksnap")
    newest.module.take_fails = errno.EFAULT
    with pytest.raises(api.StorageError, match="lost at once"):
        _snapshot(client, newest)
    made = client.create_snapshot(newest.directory / "storage", ["sdb"], limit=64 * MIB)
    with pytest.raises(api.StorageError, match="lost at once"):
        client.take(made.id)
    assert client.collect() == []
    newest.module.take_fails = 0
    assert _snapshot(client, newest).state == "taken"


def test_the_event_of_a_device_that_was_added_later_names_it(client: api.Client, newest: Host) -> None:
    second = newest.kernel.add_disk("sdc", MIB, (8, 32))
    for disk in (newest.disk, second):
        client.attach(disk.path, driver="blksnap")
    made = client.create_snapshot(newest.directory / "storage", ["sdb"], limit=64 * MIB)
    client.add(made.id, "sdc")
    client.take(made.id)
    newest.module.corrupt(newest.module.trackers[str(second.path)], errno.EPERM)
    events = client.wait_events(made.id, timeout=30)
    assert [(event.device, event.error_code) for event in events] == [("sdc", -errno.EPERM)]


def test_an_event_that_somebody_else_took_is_seen_in_the_image(client: api.Client, newest: Host) -> None:
    client.attach(newest.disk.path, driver="blksnap")
    shown = _snapshot(client, newest)
    newest.module.trackers[str(newest.disk.path)].error = errno.EIO
    assert client.snapshot(shown.id).devices[0].error_code == -errno.EIO
    assert [event.event for event in client.wait_events(shown.id, timeout=5)] == ["corrupted"]


def test_a_snapshot_that_somebody_else_destroys_is_lost(client: api.Client, newest: Host) -> None:
    client.attach(newest.disk.path, driver="blksnap")
    shown = _snapshot(client, newest)
    newest.driver().destroy(Held(shown.id, ""), [])
    await_true(lambda: client.snapshot(shown.id).state == "corrupted")
    client.destroy(shown.id)
    assert client.snapshots() == []


def test_writes_to_the_image_count_as_changed(client: api.Client, newest: Host) -> None:
    client.attach(newest.disk.path, driver="blksnap")
    shown = _snapshot(client, newest)
    write(shown.devices[0].uri or "", 5000, b"into the image")
    assert read(shown.devices[0].uri or "", 5000, 14) == b"into the image"
    newest.module.write_image(newest.disk, 5000, b"as the module sees it")
    assert client.changed_extents("sdb", 0, held=True) == [api.Extent(0, 65536)]


def test_served_and_driven_devices_do_not_mix(client: api.Client, newest: Host, short_dir: Path) -> None:
    (short_dir / "disk.img").write_bytes(bytes(MIB))
    client.attach(newest.disk.path, driver="blksnap")
    client.attach(short_dir / "disk.img")
    with pytest.raises(api.UsageError, match="not both"):
        _snapshot(client, newest, "sdb", "disk.img")
    served = client.create_snapshot("memory", ["disk.img"], limit=16 * MIB)
    with pytest.raises(api.UsageError, match="tracked in another way"):
        client.add(served.id, "sdb")
    driven = client.create_snapshot(short_dir / "storage", ["sdb"], limit=16 * MIB)
    assert sorted(client.collect()) == sorted([served.id, driven.id])
    assert sorted(device.name for device in client.devices()) == ["disk.img", "sdb"]
    with pytest.raises(api.BusyError, match="already, as sdb"):
        client.attach(newest.disk.path, name="again")
    with pytest.raises(api.BusyError, match="there is a device sdb already"):
        client.attach(short_dir / "disk.img", name="sdb")


def test_several_devices_and_a_late_one(client: api.Client, newest: Host) -> None:
    second, third = (newest.kernel.add_disk(f"sd{name}", MIB, (8, minor)) for name, minor in (("c", 32), ("d", 48)))
    for disk in (newest.disk, second, third):
        client.attach(disk.path, driver="blksnap")
    made = client.create_snapshot(newest.directory / "storage", ["sdb"], limit=64 * MIB)
    client.add(made.id, "sdc")
    with pytest.raises(api.BusyError, match="in this snapshot already"):
        client.add(made.id, "sdb")
    taken = client.take(made.id)
    assert [device.change_number for device in taken.devices] == [1, 1]
    with pytest.raises(api.StateError) as caught:
        client.add(made.id, "sdd")  # the module itself would take it, and do nothing with it
    assert caught.value.errno == errno.EALREADY
    client.detach("sdc", force=True)
    assert [device.error_code for device in client.snapshot(made.id).devices] == [0, -errno.ENODEV]


def test_what_a_module_cannot_do_is_said(client: api.Client, newest: Host) -> None:
    with pytest.raises(api.UsageError, match="options of serving"):
        client.attach(newest.disk.path, driver="blksnap", kernel=True)
    with pytest.raises(api.UsageError, match="no driver zfs"):
        client.attach(newest.disk.path, driver="zfs")
    with pytest.raises(api.UnsupportedError, match="dattobd is not loaded") as caught:
        client.attach(newest.disk.path, driver="dattobd")
    assert caught.value.exit_code == ExitCode.UNSUPPORTED
    with pytest.raises(api.UsageError, match="no block device"):
        client.attach(newest.directory, driver="blksnap")
    client.attach(newest.disk.path, driver="blksnap")
    with pytest.raises(api.StorageError, match="is a device of the snapshot itself"):
        client.create_snapshot(newest.disk.path, ["sdb"])
    with pytest.raises(api.UsageError, match="--chunk"):
        client.create_snapshot(newest.directory / "storage", ["sdb"], chunk=1 << 20)
    assert list(newest.directory.glob("state/devices/*")) == [newest.directory / "state/devices/sdb"]


@pytest.mark.parametrize("driver", ["blksnap", "dattobd"])
def test_where_no_module_is_loaded_one_sentence_says_so(stasis: Stasis, driver: str) -> None:
    nodes = [Path("/dev", entry.name) for entry in Path("/sys/class/block").iterdir()]
    disks = [path for path in nodes if path.exists()]
    if not disks or any(Path("/dev", node).exists() for node in MODULE_NODES[driver]):
        pytest.skip(f"needs a block device and no module {driver}")
    said = stasis.fail(ExitCode.UNSUPPORTED, "device", "attach", min(disks), "--driver", driver)
    assert f"the kernel module {driver} is not loaded" in said
    assert stasis.json("device", "list") == []
    assert not any((stasis.state_dir / "devices").iterdir())


def test_the_filter_commands_answer_as_those_of_a_served_device(client: api.Client, newest: Host) -> None:
    client.attach(newest.disk.path, driver="blksnap")
    made = client.create_snapshot(newest.directory / "storage", ["sdb"], limit=64 * MIB, take=True)
    info = client.control("sdb", "cbtinfo")
    assert (info["block_size"], info["block_count"], info["change_number"]) == (65536, 64, 1)
    client.control("sdb", "cbtdirty", {"ranges": [[0, 1]]})
    assert client.control("sdb", "cbtmap", {"offset": 0, "length": 2, "held": True}) == {"map": "AQA="}
    assert client.control("sdb", "snapshotinfo")["id"] == made.id
    with pytest.raises(api.StasisError) as caught:
        client.control("sdb", "format")
    assert caught.value.errno == errno.ENOTTY


def test_a_daemon_that_starts_again_finds_everything(
    newest: Host, start: Callable[[Kernel], Service], stasis: Stasis
) -> None:
    first = start(newest.kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        client.attach(newest.disk.path, driver="blksnap")
        made = _snapshot(client, newest)
    image = newest.disk.path.read_bytes()
    first.end(keep=True)
    newest.kernel.write(newest.disk, 0, b"while no daemon runs")
    start(newest.kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        assert read(client.snapshot(made.id).devices[0].uri or "", 0, 4 * MIB) == image
        assert client.map_info("sdb").held_change_number == 1
        client.destroy(made.id)
        _snapshot(client, newest)
        assert client.changed_extents("sdb", 1, held=True) == [api.Extent(0, 65536)]


@pytest.mark.expects_errors("is not tracked", "snapshot is forgotten")
def test_a_module_that_was_unloaded_meanwhile_is_told(
    newest: Host, start: Callable[[Kernel], Service], stasis: Stasis
) -> None:
    first = start(newest.kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        client.attach(newest.disk.path, driver="blksnap")
        _snapshot(client, newest)
    first.end(keep=True)
    newest.kernel.unload()
    start(newest.kernel)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        assert client.device("sdb").state == "failed"
        assert "not loaded" in str(client.device("sdb").error)
        assert client.snapshots() == []
        with pytest.raises(api.UnsupportedError):
            client.changed_extents("sdb", 0)
        newest.kernel.load(newest.module, "blksnap-control")
        newest.module.trackers.clear()
        assert client.refresh("sdb").state == "tracked"
        client.detach("sdb", forget=True)
