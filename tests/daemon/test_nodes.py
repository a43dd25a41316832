# SPDX-License-Identifier: Apache-2.0
"""A device with a kernel node: it is a disk like any other, outlives daemons, and is never pulled away in use."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stasis as api
from stasis.block import frontend
from tests.daemon.helpers import MIB, await_true, kill
from tests.runner import Stasis
from tests.unmounting import unmount

pytestmark = [
    pytest.mark.root,
    pytest.mark.tool("mkfs.ext4"),
    pytest.mark.skipif(os.geteuid() == 0 and not frontend.probe(), reason="this host has no way to make a node"),
]

MakeImage = Callable[..., Path]


@pytest.fixture
def mounted(client: api.Client, make_image: MakeImage, short_dir: Path) -> Iterator[tuple[api.Device, Path]]:
    """A device with a node, an ext4 on it, mounted."""
    device = client.attach(make_image("disk", 32 * MIB), kernel=True)
    target = short_dir / "mnt"
    target.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device.node)], check=True)
    subprocess.run(["mount", str(device.node), target], check=True)
    yield device, target
    unmount(target)


def test_a_node_is_the_device_and_goes_with_it(client: api.Client, make_image: MakeImage) -> None:
    image = make_image()
    device = client.attach(image, kernel=True)
    assert device.node is not None
    with open(device.node, "rb") as node:
        assert node.read(4096) == image.read_bytes()[:4096]
    assert client.devices()[0].node == device.node
    client.detach(device.name)
    assert client.devices() == []
    assert list((client.directories.run / "nodes").iterdir()) == []


def test_a_mounted_node_is_not_taken_away(
    client: api.Client, mounted: tuple[api.Device, Path], storage: Path
) -> None:
    device, target = mounted
    with pytest.raises(api.BusyError, match=str(target)):
        client.detach(device.name)
    (target / "file").write_text("still here")
    assert client.device(device.name).state == "serving"


def test_a_snapshot_of_a_mounted_node_is_a_file_system(
    client: api.Client, mounted: tuple[api.Device, Path], storage: Path, short_dir: Path
) -> None:
    device, target = mounted
    (target / "file").write_text("before")
    os.sync()
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    (target / "file").write_text("after")
    os.sync()
    copy = short_dir / "copy.img"
    client.copy(snapshot.id, device.name, copy)
    subprocess.run(["e2fsck", "-f", "-p", copy], check=False, capture_output=True)  # replays the journal
    subprocess.run(["e2fsck", "-f", "-n", copy], check=True, capture_output=True)
    shown = subprocess.run(["debugfs", "-R", "cat /file", copy], check=True, capture_output=True, text=True)
    assert shown.stdout == "before"


def test_a_mounted_node_outlives_the_daemon(
    stasis: Stasis, client: api.Client, mounted: tuple[api.Device, Path]
) -> None:
    device, target = mounted
    kill(stasis.daemon_pid() or 0)
    (target / "file").write_text("no daemon")
    os.sync()
    with api.connect(stasis.run_dir, stasis.state_dir) as other:
        assert other.device(device.name).node == device.node
        other.stop()  # even in order: what is mounted stays
        await_true(lambda: stasis.daemon_pid() is None)
    (target / "file").write_text("again no daemon")
    os.sync()
    with api.connect(stasis.run_dir, stasis.state_dir) as another:
        assert another.device(device.name).node == device.node


def test_a_node_that_went_with_the_daemon_comes_back(
    stasis: Stasis, client: api.Client, make_image: MakeImage
) -> None:
    client.attach(make_image(), name="disk", kernel=True)
    client.stop()
    await_true(lambda: stasis.daemon_pid() is None)
    with api.connect(stasis.run_dir, stasis.state_dir) as other:
        node = other.device("disk").node
        assert node is not None
        assert Path(node).exists()


def test_a_node_of_an_image_outlives_the_daemon_and_goes_with_the_snapshot(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    before = image.read_bytes()
    device = client.attach(image)
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB)
    with pytest.raises(api.StateError, match="not taken"):
        client.image_node(snapshot.id, device.name)
    client.take(snapshot.id)
    node = client.image_node(snapshot.id, device.name)
    assert client.image_node(snapshot.id, device.name) == node
    kill(stasis.daemon_pid() or 0)
    with api.connect(stasis.run_dir, stasis.state_dir) as other:
        assert other.snapshot(snapshot.id).device(device.name).node == node
        assert other.image_node(snapshot.id, device.name) == node
        assert Path(node).read_bytes() == before
        other.destroy(snapshot.id)
    assert not any((stasis.run_dir / "nodes").iterdir())


@pytest.mark.expects_errors("image server of .* ended", "does not go on")
def test_an_image_whose_server_died_has_a_node_again(
    client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    before = image.read_bytes()
    device = client.attach(image)
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    client.image_node(snapshot.id, device.name)
    record = json.loads((client.directories.snapshot(snapshot.id) / "snapshot.json").read_text())
    server = int(record["members"][0]["image_pid"])
    kill(server)

    def reads() -> bool:
        try:
            return Path(client.image_node(snapshot.id, device.name)).read_bytes() == before
        except (OSError, api.StasisError):
            return False

    await_true(reads)
    client.destroy(snapshot.id)
    assert not any((client.directories.run / "nodes").iterdir())


def test_a_storage_above_the_node_is_refused(
    client: api.Client, mounted: tuple[api.Device, Path], storage: Path
) -> None:
    """On its file system, and on one in a file on that: writes to it would wait for themselves."""
    device, target = mounted
    with (target / "inner").open("wb") as file:
        file.truncate(12 * MIB)
    subprocess.run(["mkfs.ext4", "-q", target / "inner"], check=True)
    (target / "mnt").mkdir()
    subprocess.run(["mount", "-o", "loop", target / "inner", target / "mnt"], check=True)
    try:
        for place in (target, target / "mnt"):
            with pytest.raises(api.StorageError, match="lies above"):
                client.create_snapshot(place / "file", [device.name], limit=MIB)
            snapshot = client.create_snapshot(place, limit=MIB)
            with pytest.raises(api.StorageError, match="lies above"):
                client.add(snapshot.id, device.name)
            client.destroy(snapshot.id)
            assert not (place / "file").exists()
    finally:
        subprocess.run(["umount", target / "mnt"], check=True)
    client.create_snapshot(storage, [device.name], limit=MIB)


def test_a_detach_by_force_leaves_the_image_alone_while_the_node_is_in_use(
    client: api.Client, mounted: tuple[api.Device, Path], storage: Path
) -> None:
    device, _ = mounted
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    with pytest.raises(api.BusyError, match="mounted"):
        client.detach(device.name, force=True)
    assert client.snapshot(snapshot.id).state == "taken"
