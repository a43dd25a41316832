# SPDX-License-Identifier: Apache-2.0
"""dattobd behind the interface of the other drivers: it knows neither numbers nor maps, and yet no change is missed."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from stasis.blksnap.drivers import Driver, Held, Tracked, probe
from stasis.block.changemap import ChangeMap
from stasis.errors import (
    BusyError,
    GenerationError,
    NotFoundError,
    StateError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from tests.blksnap.conftest import MIB
from tests.blksnap.fake_datto import FakeDatto
from tests.blksnap.fake_kernel import Disk, FakeKernel


@dataclass
class Host:
    """A kernel with dattobd, and a disk of 4 MiB mounted on a directory."""

    kernel: FakeKernel
    module: FakeDatto
    disk: Disk
    mount: Path
    device: Tracked

    def driver(self) -> Driver:
        return probe("dattobd", self.kernel, str(self.disk.path))


@pytest.fixture
def host(kernel: FakeKernel, short_dir: Path) -> Host:
    module = FakeDatto(kernel)
    kernel.load(module, "datto-ctl")
    disk = kernel.add_disk("sdb1", 4 * MIB, (8, 17))
    disk.mounted_on = short_dir / "mnt"
    disk.mounted_on.mkdir()
    return Host(kernel, module, disk, disk.mounted_on, Tracked("sdb1", str(disk.path), short_dir / "map"))


def _take(host: Host, driver: Driver, limit: int | None = 64 * MIB) -> Held:
    held = driver.create(str(host.mount), limit, [host.device])
    driver.take(held, [host.device])
    return held


def _map(host: Host) -> ChangeMap:
    return ChangeMap.open_readonly(host.device.map_path)


def test_attaching_tracks_and_holds_nothing(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    (traced,) = host.module.minors.values()
    assert traced.state == 2
    assert not host.module.image(0).exists()
    with _map(host) as changes:
        assert (changes.change_number, changes.capacity) == (0, 4 * MIB)
    driver.detach(host.device)
    assert not host.module.minors
    assert list(host.mount.iterdir()) == []


def test_every_changed_byte_is_in_the_map(host: Host, seed: int) -> None:
    draw, driver = random.Random(seed), host.driver()
    driver.attach(host.device)
    images: list[bytes] = []
    for number in range(1, 8):
        held = _take(host, driver)
        image = driver.image(held, host.device)
        assert image.error_code == 0
        images.append(Path(image.node or "").read_bytes())
        assert images[-1] == host.disk.path.read_bytes()
        with _map(host) as changes:
            assert changes.held_number == number
            for since in range(1, number):
                covered = bytearray(images[since - 1])
                for offset, length in changes.changed_extents(since, held=True):
                    covered[offset : offset + length] = images[-1][offset : offset + length]
                assert bytes(covered) == images[-1]
        for index in range(draw.randrange(6)):
            if index == 3:
                driver.destroy(held, [host.device])
            offset = draw.randrange(4 * MIB - 5000)
            host.kernel.write(host.disk, offset, draw.randbytes(draw.randrange(1, 5000)))
        if host.module.minors[0].state == 3:
            driver.destroy(held, [host.device])
    assert len(list(host.mount.iterdir())) == 1


def test_marks_by_hand_show_at_once_and_again(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    held = _take(host, driver)
    driver.mark(host.device, [(MIB, 1)])
    with _map(host) as changes:
        assert changes.changed_extents(0, held=True) == [(MIB, 65536)]
    driver.destroy(held, [host.device])
    _take(host, driver)
    with _map(host) as changes:
        assert changes.changed_extents(1, held=True) == [(MIB, 65536)]


def test_the_last_number_begins_a_generation(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    host.device.notes["number"] = 254
    before = host.device.notes["generation"]
    driver.update_map(host.device, held=False)
    _take(host, driver)
    with _map(host) as changes:
        assert changes.held_number == 0
        assert changes.held_generation != before
        assert changes.changed_extents(0, held=True) == [(0, 4 * MIB)]


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_cow_file_that_cannot_be_believed_begins_a_generation(host: Host, damage: str) -> None:
    driver = host.driver()
    driver.attach(host.device)
    driver.destroy(_take(host, driver), [host.device])
    before, cow = host.device.notes["generation"], Path(host.device.notes["cow"])
    finish = host.module.minors[0].finish

    def damaged() -> None:
        finish()
        if damage == "cut":
            cow.write_bytes(cow.read_bytes()[:5000])
        elif damage == "gone":
            cow.unlink()
        else:
            cow.write_bytes(cow.read_bytes().replace(host.module.minors[0].uuid, bytes(16)))

    host.module.minors[0].finish = damaged  # type: ignore[method-assign]
    _take(host, driver)
    with _map(host) as changes:
        assert changes.held_generation != before
        assert changes.changed_extents(0, held=True) == [(0, 4 * MIB)]


@pytest.mark.parametrize("counter", [8, None])
def test_a_discard_which_the_module_overlooks_begins_a_generation(host: Host, counter: int | None) -> None:
    driver = host.driver()
    driver.attach(host.device)
    driver.destroy(_take(host, driver), [host.device])
    before, host.disk.discarded = host.device.notes["generation"], counter
    driver.destroy(_take(host, driver), [host.device])
    with _map(host) as changes:
        assert changes.generation != before
    host.disk.discarded = 8
    driver.destroy(_take(host, driver), [host.device])
    known = host.device.notes["generation"]
    host.kernel.write(host.disk, 0, b"x")
    _take(host, driver)
    with _map(host) as changes:
        assert changes.held_generation == known
        assert changes.changed_extents(changes.held_number - 1, held=True) == [(0, 65536)]


def test_a_failed_device_tells_nothing(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    held = _take(host, driver)
    host.module.break_down(host.module.minors[0], errno.EFBIG)
    assert driver.image(held, host.device).error_code == -errno.EFBIG
    driver.update_map(host.device, held=True)
    with _map(host) as changes, pytest.raises(GenerationError, match="dattobd has failed: File too large"):
        changes.changed_extents(0, held=True)
    driver.destroy(held, [host.device])
    with pytest.raises(StateError, match="has failed"):
        _take(host, driver)
    driver.detach(host.device)
    driver.attach(host.device)
    driver.destroy(_take(host, driver), [host.device])


def test_a_full_cow_file_loses_the_image(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    held = _take(host, driver, limit=MIB)
    for offset in range(0, 4 * MIB, 4096):
        host.kernel.write(host.disk, offset, b"x")
    assert driver.image(held, host.device).error_code == -errno.EFBIG


def test_the_module_goes_on_with_the_same_device(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    driver.destroy(_take(host, driver), [host.device])
    host.kernel.write(host.disk, 0, b"between two daemons")
    again = Tracked("sdb1", host.device.path, host.device.map_path, notes=dict(host.device.notes))
    driver.attach(again)
    host.device = again
    _take(host, driver)
    with _map(host) as changes:
        assert changes.changed_extents(1, held=True) == [(0, 65536)]


def test_somebody_elses_snapshot_is_left_alone(host: Host) -> None:
    driver = host.driver()
    driver.attach(host.device)
    _take(host, driver)
    stranger = Tracked("other", host.device.path, host.device.map_path.with_name("other"))
    with pytest.raises(BusyError, match="minor 0 already, in state 3"):
        driver.attach(stranger)
    host.module.minors[0].state = 2
    driver.attach(stranger)
    assert stranger.notes["generation"] != host.device.notes["generation"]


def test_refusals(host: Host, short_dir: Path) -> None:
    driver = host.driver()
    with pytest.raises(NotFoundError, match="no such device"):
        driver.detach(Tracked("x", "/dev/x", short_dir / "x", notes={"minor": 7, "cow": ""}))
    driver.attach(host.device)
    with pytest.raises(StorageError, match="no directory on"):
        driver.create("/proc", None, [host.device])
    held = driver.create(str(host.mount), None, [host.device])
    with pytest.raises(UnsupportedError, match="one device at a time"):
        driver.add(held, host.device)
    driver.take(held, [host.device])
    host.module.minors[0].busy = True
    with pytest.raises(BusyError, match="its image is open"):
        driver.destroy(held, [host.device])
    host.module.minors[0].busy = False
    host.module.break_down(host.module.minors[0], errno.EIO)
    with pytest.raises(StateError):
        driver.take(held, [host.device])
    host.disk.mounted_on = None
    other = Tracked("sdc", str(host.kernel.add_disk("sdc", MIB, (8, 32)).path), short_dir / "c")
    with pytest.raises(UsageError, match="not mounted for writing"):
        driver.attach(other)
