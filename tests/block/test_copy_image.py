# SPDX-License-Identifier: Apache-2.0
"""Copies of real images: over NBD, by the command line, to block devices, and when the server goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stasis.block.copy import CopyIdentity, CopyOptions, copy_image
from stasis.block.copy.source import NbdSource
from stasis.errors import BusyError, ExitCode, StorageError
from stasis.linux import files
from stasis.nbd.client import Client
from tests.nbd.serve import SIZE, served
from tests.runner import Stasis
from tests.unmounting import unmount

MIB = 1 << 20
SERVED = b"a" * MIB + bytes(SIZE - MIB)
IDENTITY = CopyIdentity("5e1f", "disk", "9d03", 1)


def disk_with_data(path: Path, size: int) -> bytes:
    data = os.urandom(size)
    path.write_bytes(data)
    return data


def write_to(uri: str, offset: int, data: bytes) -> None:
    with Client.connect(uri) as client:
        client.pwrite(offset, data)
        client.flush()


# ---- over NBD


def test_an_image_is_read_over_nbd_and_its_holes_stay_holes(short_dir: Path, tmp_path: Path) -> None:
    with served(short_dir / "s") as uri:
        copy_image(uri, tmp_path / "t", IDENTITY, options=CopyOptions(verify=True))
    assert (tmp_path / "t").read_bytes() == SERVED
    with open(tmp_path / "t", "rb") as target:
        assert next(files.data_extents(target.fileno(), 0, SIZE)) == (0, MIB, True)


def test_a_server_that_goes_away_leaves_a_copy_that_goes_on_with_the_next_one(short_dir: Path, tmp_path: Path) -> None:
    options = CopyOptions(window_size=MIB // 4, connections=1, checkpoint_seconds=0.0)
    uri = f"nbd+unix:///disk?socket={short_dir / 's'}"

    with served(short_dir / "s"), pytest.raises(StorageError, match="failed"):
        copy_image(dying_after(3, uri), tmp_path / "t", IDENTITY, options=options)
    with served(short_dir / "s"):
        result = copy_image(uri, tmp_path / "t", IDENTITY, options=options)
    assert result.position_at_start == 3 * options.window_size
    assert (tmp_path / "t").read_bytes() == SERVED


def dying_after(reads: int, uri: str) -> Callable[[], NbdSource]:
    """Connections of which each breaks before a read."""

    class Dying(NbdSource):
        left = reads

        def read(self, extents, buffer) -> None:  # type: ignore[no-untyped-def]
            if not Dying.left:
                self.abort()
            Dying.left -= 1
            super().read(extents, buffer)

    return lambda: Dying(uri)


def test_a_signal_leaves_a_copy_that_goes_on(short_dir: Path, tmp_path: Path) -> None:
    options = CopyOptions(window_size=MIB // 4, checkpoint_seconds=0.0)

    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with served(short_dir / "s") as uri:
        with pytest.raises(KeyboardInterrupt):
            copy_image(uri, tmp_path / "t", IDENTITY, options=options, progress=interrupt)
        assert (tmp_path / "t.stasis-copy").exists()
        copy_image(uri, tmp_path / "t", IDENTITY, options=options)
    assert (tmp_path / "t").read_bytes() == SERVED


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        copy_image(f"nbd+unix:///disk?socket={tmp_path / 'none'}", tmp_path / "t", IDENTITY)
    assert not list(tmp_path.iterdir())


# ---- by the command line


def test_a_full_and_an_incremental_copy_are_the_images(stasis: Stasis, tmp_path: Path) -> None:
    disk, target = tmp_path / "disk.img", tmp_path / "backup.img"
    first = disk_with_data(disk, 4 * MIB + 512)
    uri = stasis("device", "attach", disk, "--name", "disk")
    one = stasis("snapshot", "create", "--storage", tmp_path, "disk", "--take")
    number = stasis.json("snapshot", "show", one)["devices"][0]["change_number"]
    write_to(uri, 3 * MIB, b"n" * 5000)
    lines = stasis("snapshot", "copy", one, "disk", target, "--verify", "--json").splitlines()
    assert target.read_bytes() == first
    assert json.loads(lines[-1])["message_type"] == "summary"
    stasis("snapshot", "destroy", one)
    two = stasis("snapshot", "create", "--storage", tmp_path, "disk", "--take")
    summary = json.loads(
        stasis("snapshot", "copy", two, "disk", target, "--since", str(number), "--json").splitlines()[-1]
    )
    assert target.read_bytes() == first[: 3 * MIB] + b"n" * 5000 + first[3 * MIB + 5000 :]
    assert 5000 <= summary["bytes_copied"] <= 128 * 1024
    stasis("snapshot", "destroy", two)
    stasis("device", "detach", "disk")


def test_the_origin_and_a_wrong_generation_are_refused(stasis: Stasis, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk_with_data(disk, MIB)
    stasis("device", "attach", disk, "--name", "disk")
    uuid = stasis("snapshot", "create", "--storage", tmp_path, "disk", "--take")
    assert "origin" in stasis.fail(ExitCode.USAGE, "snapshot", "copy", uuid, "disk", disk)
    other = "00000000-0000-4000-8000-000000000000"
    words = ("--since", "0", "--generation", other)
    said = stasis.fail(ExitCode.GENERATION, "snapshot", "copy", uuid, "disk", tmp_path / "t", *words)
    assert other in said
    stasis("snapshot", "destroy", uuid)
    stasis("device", "detach", "disk")


# ---- to block devices


@contextmanager
def loop_device(path: Path, size: int) -> Iterator[Path]:
    path.write_bytes(b"\xee" * size)
    device = subprocess.run(
        ["losetup", "--find", "--show", path], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def device_copy(short_dir: Path, tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """A copy of the served image to a device; the record is kept out of /dev by a link to the device."""

    def copy(device: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(device)
        copy_image(uri, link, IDENTITY, options=CopyOptions(verify=True))

    with served(short_dir / "s") as uri:
        yield copy


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_a_block_device_holds_the_image_and_keeps_what_lies_behind_it(
    tmp_path: Path, device_copy: Callable[[Path], None]
) -> None:
    with loop_device(tmp_path / "backing", SIZE + MIB) as device:
        device_copy(device)
        assert device.read_bytes() == SERVED + b"\xee" * MIB


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_a_block_device_that_is_too_small_is_refused(tmp_path: Path, device_copy: Callable[[Path], None]) -> None:
    with loop_device(tmp_path / "backing", SIZE - MIB) as device:
        with pytest.raises(StorageError, match="too small"):
            device_copy(device)
        assert device.read_bytes() == b"\xee" * (SIZE - MIB)


@pytest.mark.root
@pytest.mark.tool("losetup", "mkfs.ext4")
def test_a_mounted_block_device_is_refused_by_its_mount(tmp_path: Path, device_copy: Callable[[Path], None]) -> None:
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with loop_device(tmp_path / "backing", 2 * SIZE) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, mount_point], check=True)
        try:
            with pytest.raises(BusyError, match=str(mount_point)):
                device_copy(device)
        finally:
            unmount(mount_point)
