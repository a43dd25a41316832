# SPDX-License-Identifier: Apache-2.0
"""The Python API does what its documentation says, on image files, as an ordinary user would use it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stasis as api
from stasis.block.copy.target import Target
from stasis.daemon import copying
from stasis.errors import ExitCode
from stasis.nbd.client import Client as NbdClient
from stasis.nbd.tls import TlsConfig
from tests.daemon.helpers import MIB, await_true, read, write
from tests.nbd.certificates import make_certificates

MakeImage = Callable[..., Path]


def test_attach_serves_what_is_in_the_file(client: api.Client, make_image: MakeImage) -> None:
    image = make_image()
    device = client.attach(image)
    assert (device.name, device.path, device.size, device.state) == ("disk.img", str(image), 4 * MIB, "serving")
    assert read(device.uri, 4096, 10000) == image.read_bytes()[4096:14096]
    write(device.uri, 100, b"x" * 1000)
    assert image.read_bytes()[100:1100] == b"x" * 1000
    assert [shown.name for shown in client.devices()] == ["disk.img"]


def test_the_image_is_the_device_at_the_instant_of_the_take(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image)
    before = image.read_bytes()
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    write(device.uri, MIB, b"new" * 4096)
    member = snapshot.device(device.name)
    assert snapshot.state == "taken"
    assert member.uri is not None
    assert read(member.uri, 0, 4 * MIB) == before
    assert read(device.uri, MIB, 3) == b"new"


def test_writes_to_an_image_do_not_reach_the_device(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image)
    before = image.read_bytes()
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    uri = snapshot.device(device.name).uri or ""
    write(uri, 5000, b"scratch")
    assert read(uri, 5000, 7) == b"scratch"
    assert image.read_bytes() == before


def test_a_snapshot_of_several_devices_can_be_built_step_by_step(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    for name in ("a", "b"):
        client.attach(make_image(name))
    made = client.create_snapshot(storage, ["a"], limit=64 * MIB)
    assert (made.state, [device.uri for device in made.devices]) == ("created", [None])
    client.add(made.id, "b")
    taken = client.take(made.id)
    assert [device.name for device in taken.devices] == ["a", "b"]
    assert all(device.uri and device.change_number == 1 for device in taken.devices)
    assert taken.hold_ns is not None
    assert max(device.held_ns for device in taken.devices) <= taken.hold_ns
    assert client.collect() == [made.id]
    assert client.snapshot(made.id[:8]).id == made.id
    client.destroy(made.id)
    assert client.collect() == []


def test_changes_are_those_of_the_epoch(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    device = client.attach(make_image())
    write(device.uri, 0, b"first")
    first = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    number = first.device(device.name).change_number
    assert number == 1
    write(device.uri, 2 * MIB + 5, b"second")
    assert client.changed_extents(device.name, number) == [api.Extent(2 * MIB, 65536)]
    assert client.changed_extents(device.name, 0, held=True) == [api.Extent(0, 65536)]
    client.mark(device.name, [(3 * MIB, 1), (3 * MIB + 65536, 65536)])
    assert client.changed_extents(device.name, number) == [
        api.Extent(2 * MIB, 65536),
        api.Extent(3 * MIB, 131072),
    ]
    bytes_of_map = client.read_map(device.name)
    assert len(bytes_of_map) == client.map_info(device.name).block_count == 64
    assert bytes_of_map[32] == number + 1


def test_an_incremental_copy_makes_the_target_equal(
    client: api.Client, make_image: MakeImage, storage: Path, short_dir: Path
) -> None:
    image, target = make_image(), short_dir / "copy.img"
    device = client.attach(image)
    first = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    client.copy(first.id, device.name, target)
    number = first.device(device.name).change_number
    client.destroy(first.id)
    write(device.uri, MIB, os.urandom(70000))
    second = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    then = image.read_bytes()
    write(device.uri, 0, os.urandom(4096))
    result = client.copy(second.id, device.name, target, since=number)
    assert target.read_bytes() == then
    assert result.bytes_copied == 2 * 65536


def small_snapshot(client: api.Client, device: api.Device) -> api.Snapshot:
    client.set_settings({"diff_storage_minimum": 128 << 10})
    return client.create_snapshot("memory", [device.name], limit=MIB, take=True)


def overflow(device: api.Device) -> None:
    """Write until the storage of the snapshot that the device is in is full."""
    with NbdClient.connect(device.uri, timeout=30) as export:
        export.pwrite(0, os.urandom(device.size))


def test_a_copy_of_a_lost_image_asks_for_a_new_snapshot(
    client: api.Client, make_image: MakeImage, short_dir: Path
) -> None:
    device, target = client.attach(make_image()), short_dir / "copy.img"
    snapshot = small_snapshot(client, device)
    overflow(device)
    with pytest.raises(api.StorageError, match=r"image of disk\.img .* is lost: No space left") as raised:
        client.copy(snapshot.id, device.name, target)
    assert "new snapshot with a larger --limit" in raised.value.hint
    assert not target.exists()


def test_a_copy_whose_image_is_lost_meanwhile_says_how_to_go_on(
    client: api.Client, make_image: MakeImage, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, target = client.attach(make_image()), short_dir / "copy.img"
    small = small_snapshot(client, device)
    real = copying.copy_image

    def interrupted(*arguments: Any, **options: Any) -> Any:
        overflow(device)
        return real(*arguments, **options)

    monkeypatch.setattr(copying, "copy_image", interrupted)
    with pytest.raises(api.StorageError, match="is lost") as raised:
        client.copy(small.id, device.name, target)
    monkeypatch.undo()
    record = f"{target}.stasis-copy"
    assert f"new snapshot with a larger --limit or storage, remove {record} and copy" in raised.value.hint
    client.destroy(small.id)
    os.unlink(record)
    large = client.create_snapshot("memory", [device.name], limit=64 * MIB, take=True)
    client.copy(large.id, device.name, target)
    assert target.read_bytes() == Path(device.path).read_bytes()


def test_a_copy_that_fails_for_another_reason_can_be_repeated(
    client: api.Client, make_image: MakeImage, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = client.attach(make_image())
    snapshot = client.create_snapshot("memory", [device.name], limit=64 * MIB, take=True)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Target, "write", full)
    with pytest.raises(api.StorageError) as raised:
        client.copy(snapshot.id, device.name, short_dir / "copy.img")
    assert "repeat the command" in raised.value.hint
    monkeypatch.undo()
    client.copy(snapshot.id, device.name, short_dir / "copy.img")
    assert (short_dir / "copy.img").read_bytes() == Path(device.path).read_bytes()


def test_a_number_of_another_generation_is_refused(client: api.Client, make_image: MakeImage) -> None:
    device = client.attach(make_image())
    with pytest.raises(api.GenerationError) as raised:
        client.changed_extents(device.name, 5)
    assert raised.value.exit_code == ExitCode.GENERATION
    with pytest.raises(api.GenerationError):
        client.changed_extents(device.name, 0, generation="00000000-0000-0000-0000-000000000000")


def test_storage_may_be_an_open_descriptor(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    device = client.attach(make_image())
    fd = os.open(storage, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        snapshot = client.create_snapshot(fd, [device.name], limit=64 * MIB, take=True)
    finally:
        os.close(fd)
    assert snapshot.storage.path == "descriptor"
    before = read(device.uri, 0, MIB)
    write(device.uri, 0, bytes(MIB))
    assert read(snapshot.device(device.name).uri or "", 0, MIB) == before


def test_every_watcher_sees_every_event_and_is_told_the_end(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    device = client.attach(make_image("disk.img", 64 * MIB))
    client.set_settings({"diff_storage_minimum": MIB})
    snapshot = client.create_snapshot(storage, [device.name], limit=8 * MIB, take=True)
    seen: list[list[api.Event]] = [[], []]

    def watch(events: list[api.Event]) -> None:
        with api.connect(client.directories.run, client.directories.state) as own:
            events.extend(own.watch(snapshot.id))

    watchers = [threading.Thread(target=watch, args=(events,)) for events in seen]
    for watcher in watchers:
        watcher.start()
    for offset in range(0, 64 * MIB, MIB):
        write(device.uri, offset, b"y" * MIB)
    await_true(lambda: client.snapshot(snapshot.id).error_code == -errno.ENOSPC)
    client.destroy(snapshot.id)
    for watcher in watchers:
        watcher.join(30)
        assert not watcher.is_alive()
    assert seen[0] == seen[1]
    names = [event.event for event in seen[0]]
    assert names.count("corrupted") == names.count("no_space") == 1
    assert names.index("low_space") < names.index("no_space") < names.index("corrupted")
    corrupted = seen[0][names.index("corrupted")]
    assert (corrupted.code, corrupted.device, corrupted.error_code) == (0, device.name, -errno.ENOSPC)


def test_an_overflow_costs_the_snapshot_and_not_the_origin(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    device = client.attach(make_image("disk.img", 32 * MIB))
    client.set_settings({"diff_storage_minimum": MIB})
    snapshot = client.create_snapshot(storage, [device.name], limit=4 * MIB, take=True)
    for offset in range(0, 32 * MIB, MIB):
        write(device.uri, offset, b"z" * MIB)
    shown = client.snapshot(snapshot.id)
    await_true(lambda: client.snapshot(snapshot.id).state == "corrupted")
    assert shown.storage.filled <= shown.storage.limit == 4 * MIB
    with pytest.raises(OSError) as raised:
        read(snapshot.device(device.name).uri or "", 0, 4096)
    assert raised.value.errno == errno.EIO
    assert Path(device.path).read_bytes() == b"z" * (32 * MIB)
    events = client.wait_events(snapshot.id, timeout=30)
    assert events == client.wait_events(snapshot.id, timeout=0)
    assert client.wait_events(snapshot.id, after=events[-1].sequence, timeout=0) == []


def test_settings_change_and_are_checked(client: api.Client) -> None:
    assert client.settings()["chunk_minimum_shift"] == 16
    assert client.set_settings({"chunk_minimum_shift": 18})["chunk_minimum_shift"] == 18
    for wrong in ({"no_such_setting": 1}, {"chunk_minimum_shift": 99}):
        with pytest.raises(api.UsageError):
            client.set_settings(wrong)
    assert client.settings()["chunk_minimum_shift"] == 18


def test_settings_decide_at_the_next_attach_and_take(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    client.set_settings({"tracking_block_minimum_shift": 17, "chunk_minimum_shift": 18})
    device = client.attach(make_image())
    assert device.tracking_block == 1 << 17
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    assert snapshot.device(device.name).chunk == 1 << 18
    assert client.attach(make_image("b"), tracking_block=1 << 20).tracking_block == 1 << 20


def test_the_map_outlives_detach_and_attach(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    image = make_image()
    device = client.attach(image)
    client.destroy(client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True).id)
    write(device.uri, MIB, b"kept")
    generation = client.map_info(device.name).generation
    client.detach(device.name)
    again = client.attach(image)
    assert (again.generation, again.change_number) == (generation, 1)
    assert client.changed_extents(device.name, 1) == [api.Extent(MIB, 65536)]


def test_a_map_of_another_file_is_not_used(client: api.Client, make_image: MakeImage) -> None:
    device = client.attach(make_image("a"), name="disk")
    client.detach("disk")
    assert client.attach(make_image("b"), name="disk").generation != device.generation


def test_detach_with_forget_removes_the_map(client: api.Client, make_image: MakeImage) -> None:
    device = client.attach(make_image())
    client.detach(device.name, forget=True)
    with pytest.raises(api.NotFoundError):
        client.map_info(device.name)
    assert list((client.directories.state / "devices").iterdir()) == []


@pytest.mark.parametrize("name", ["/dev/null", "../devices/disk.img"])
def test_a_path_is_not_the_name_of_a_map(client: api.Client, make_image: MakeImage, name: str) -> None:
    client.attach(make_image(), name="disk.img")
    with pytest.raises(api.NotFoundError, match="no change map of a device"):
        client.map_info(name)


def test_detach_by_force_makes_the_image_unreadable(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    for name in ("a", "b"):
        client.attach(make_image(name))
    snapshot = client.create_snapshot(storage, ["a", "b"], limit=64 * MIB, take=True)
    with pytest.raises(api.BusyError):
        client.detach("a")
    client.detach("a", force=True)
    shown = client.snapshot(snapshot.id)
    assert (shown.state, shown.device("a").error_code) == ("corrupted", -errno.ENODEV)
    with pytest.raises(OSError):
        read(shown.device("a").uri or "", 0, 512)
    assert read(shown.device("b").uri or "", 0, 512) == (client.directories.run.parent / "b").read_bytes()[:512]


def test_a_device_that_grows_gets_a_new_generation(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image)
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    os.truncate(image, 8 * MIB)
    await_true(lambda: client.refresh(device.name).size == 8 * MIB)
    assert client.device(device.name).generation != device.generation
    assert [event.event for event in client.wait_events(snapshot.id, timeout=30)] == ["generation"]


def test_images_can_be_served_over_tcp(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    image = make_image()
    device = client.attach(image, tcp="127.0.0.1:0")
    assert device.tcp_uri is not None
    assert read(device.tcp_uri, 0, 512) == image.read_bytes()[:512]
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True, tcp="127.0.0.1:0")
    assert read(snapshot.device(device.name).tcp_uri or "", 512, 512) == image.read_bytes()[512:1024]


@pytest.mark.tool("openssl")
def test_device_and_image_over_tls(
    client: api.Client, make_image: MakeImage, storage: Path, tmp_path: Path
) -> None:
    server, own, _ = make_certificates(tmp_path)
    image = make_image()
    device = client.attach(image, tcp="127.0.0.1:0", tls_certificates=server)
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True, tcp="127.0.0.1:0",
                                      tls_certificates=server)
    for uri in (device.tcp_uri, snapshot.device(device.name).tcp_uri):
        assert uri is not None
        assert uri.startswith("nbds://")
        with NbdClient.connect(uri, tls=TlsConfig(directory=own), timeout=30) as export:
            assert export.pread(0, 4096) == image.read_bytes()[:4096]
