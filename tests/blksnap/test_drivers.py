# SPDX-License-Identifier: Apache-2.0
"""blksnap's drivers against every generation of a module that does what the real ones do, their mistakes included."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from stasis.blksnap.drivers import Driver, Held, Tracked, feeding, probe
from stasis.blksnap.drivers.generations import CURRENT
from stasis.block.changemap import ChangeMap
from stasis.errors import (
    BusyError,
    GenerationError,
    NotFoundError,
    StasisError,
    StateError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from tests.blksnap.conftest import FILTERED, MIB, Host
from tests.blksnap.fake_blksnap import CHUNK, FakeBlksnap
from tests.blksnap.fake_kernel import FakeKernel

LIMIT = 64 * MIB


def _taken(host: Host, driver: Driver, *devices: Tracked, limit: int = LIMIT) -> Held:
    held = driver.create(str(host.directory / "storage"), limit, devices)
    driver.take(held, devices)
    return held


def _attach_and_take(host: Host, driver: Driver, device: Tracked) -> Held:
    driver.attach(device)
    return _taken(host, driver, device)


def _map(device: Tracked) -> ChangeMap:
    return ChangeMap.open_readonly(device.map_path)


def _changed(device: Tracked, since: int) -> list[tuple[int, int]]:
    with _map(device) as changes:
        return changes.changed_extents(since, held=True)


# -- which module is it ---------------------------------------------------------------------------


def test_the_generation_is_told_without_changing_anything(host: Host, request: pytest.FixtureRequest) -> None:
    driver = host.driver()
    assert driver.version == f"2.0.0.0, interface {request.node.callspec.params['host']}"
    assert not host.module.trackers
    assert not host.module.snapshots


@pytest.mark.parametrize("generation", FILTERED)
def test_an_attached_filter_does_not_hide_the_generation(make_host: Callable[[str], Host], generation: str) -> None:
    host = make_host(generation)
    host.driver().attach(host.tracked())
    assert host.driver().version.endswith(generation)
    host.module.other_filter.add(str(host.disk.path))
    assert host.driver().version.endswith(generation)


@pytest.mark.parametrize(("name", "node"), [("blksnap", "blksnap-control"), ("dattobd", "datto-ctl")])
def test_a_module_that_is_not_loaded_is_one_sentence(kernel: FakeKernel, name: str, node: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is not loaded: there is no {kernel.dev}/{node}") as caught:
        probe(name, kernel, "/dev/sdb")
    assert "modprobe" in caught.value.hint


def test_what_cannot_be_driven_is_named(newest: Host) -> None:
    newest.kernel.unload()
    (newest.kernel.dev / "veeamblksnap").touch()
    with pytest.raises(UnsupportedError, match="Veeam Agent"):
        newest.driver()
    with pytest.raises(UsageError, match="no driver zfs"):
        probe("zfs", newest.kernel, str(newest.disk.path))


def test_a_module_of_the_future_is_refused(newest: Host) -> None:
    newest.kernel.refused["version"] = errno.ENOTTY
    with pytest.raises(UnsupportedError, match="does not know"):
        newest.driver()


# -- the life of a snapshot -----------------------------------------------------------------------


def test_the_image_is_the_disk_at_the_take(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    assert device.size == 4 * MIB
    held = _taken(host, driver, device)
    before = host.disk.path.read_bytes()
    host.kernel.write(host.disk, MIB, b"new" * 1000)
    image = driver.image(held, device)
    assert image.error_code == 0
    assert Path(image.node or "").read_bytes() == before
    assert driver.exists(held)
    driver.destroy(held, [device])
    assert not driver.exists(held)
    driver.detach(device)
    assert not host.module.trackers


def test_every_changed_byte_is_in_the_map(host: Host, seed: int) -> None:
    """Compared with the images themselves, over many snapshots and any two of them."""
    draw, driver, device = random.Random(seed), host.driver(), host.tracked()
    driver.attach(device)
    images: list[bytes] = []
    for number in range(1, 8):
        held = _taken(host, driver, device)
        images.append(Path(driver.image(held, device).node or "").read_bytes())
        for since in range(1, number):
            covered = bytearray(images[since - 1])
            for offset, length in _changed(device, since):
                covered[offset : offset + length] = images[-1][offset : offset + length]
            assert bytes(covered) == images[-1]
        driver.destroy(held, [device])
        for _ in range(draw.randrange(6)):
            offset = draw.randrange(4 * MIB - 5000)
            host.kernel.write(host.disk, offset, draw.randbytes(draw.randrange(1, 5000)))


def test_nothing_is_known_of_changes_since_the_last_snapshot(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    _taken(host, driver, device)
    with _map(device) as changes:
        assert changes.changed_extents(1) == [(0, 4 * MIB)]
        assert changes.changed_extents(1, held=True) == []
        assert "last snapshot" in changes.assumed


def test_writes_to_the_image_and_dirty_marks_show_at_once_and_again(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device)
    host.module.write_image(host.disk, 0, b"x")
    driver.mark(device, [(MIB, 1), (2 * MIB, 100_000), (3 * MIB, 0)])
    driver.update_map(device, held=True)
    expected = [(0, 65536), (MIB, 65536), (2 * MIB, 2 * 65536)]
    assert _changed(device, 0) == expected
    driver.destroy(held, [device])
    _taken(host, driver, device)
    assert _changed(device, 1) == expected


def test_a_wrapped_map_is_not_taken_for_an_increment(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    kept = host.module.trackers[str(host.disk.path)].map
    kept.previous, kept.active = 253, 254
    driver.destroy(_taken(host, driver, device), [device])
    with _map(device) as changes:
        last = changes.generation
        assert changes.held_number == 254
    host.kernel.write(host.disk, MIB, b"before the wrap")
    held = _taken(host, driver, device)
    with _map(device) as changes:
        assert (changes.held_number, changes.change_number) == (0, 0)
        assert changes.generation != last
        assert changes.changed_extents(0, held=True) == [(0, 4 * MIB)]
        with pytest.raises(GenerationError):
            changes.changed_extents(254, held=True, generation=last)
    driver.destroy(held, [device])
    host.kernel.write(host.disk, 2 * MIB, b"after the wrap")
    _taken(host, driver, device)
    assert _changed(device, 0) == [(2 * MIB, 65536)]


def test_a_module_that_has_just_wrapped_for_others_tells_nothing(filtered: Host) -> None:
    driver, device = filtered.driver(), filtered.tracked()
    driver.attach(device)
    kept = filtered.module.trackers[str(filtered.disk.path)].map
    kept.previous, kept.active, kept.read = 255, 1, bytearray(kept.count)
    driver.update_map(device, held=True)
    with _map(device) as changes:
        assert changes.held_number == 0
    assert _changed(device, 0) == [(0, 4 * MIB)]


def test_a_resized_disk_begins_a_generation(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    driver.destroy(_taken(host, driver, device), [device])
    with host.disk.path.open("r+b") as file:
        file.truncate(5 * MIB)
    _taken(host, driver, device)
    assert device.size == 5 * MIB
    with _map(device) as changes:
        assert changes.changed_extents(0, held=True) == [(0, 5 * MIB)]


def test_a_corrupted_map_tells_nothing(filtered: Host) -> None:
    driver, device = filtered.driver(), filtered.tracked()
    driver.attach(device)
    filtered.module.trackers[str(filtered.disk.path)].map.corrupted = True
    driver.update_map(device, held=False)
    with _map(device) as changes, pytest.raises(GenerationError, match="corrupted"):
        changes.changed_extents(0)


def test_a_filter_that_is_there_already_is_taken_over(filtered: Host) -> None:
    driver, device = filtered.driver(), filtered.tracked()
    driver.attach(device)
    generation = filtered.module.trackers[str(filtered.disk.path)].map.generation
    driver.attach(device)
    with _map(device) as changes:
        assert changes.generation == str(generation)


# -- what the modules do wrong --------------------------------------------------------------------


@pytest.mark.parametrize("generation", [name for name in FILTERED if name != "v5"])
def test_an_add_that_was_refused_in_silence_is_noticed(make_host: Callable[[str], Host], generation: str) -> None:
    host = make_host(generation)
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    host.disk.mounted_on = host.directory / "storage"
    with pytest.raises(StorageError, match="holds the difference storage"):
        driver.create(str(host.directory / "storage"), LIMIT, [device])
    assert not host.module.snapshots


def test_old_modules_get_every_dirty_range(kernel: FakeKernel, short_dir: Path) -> None:
    module = FakeBlksnap(kernel, CURRENT, applies_first_only=True)
    kernel.load(module, "blksnap-control")
    (short_dir / "storage").mkdir()
    host = Host(kernel, module, kernel.add_disk("sdb", 4 * MIB, (8, 16)), short_dir)
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    _taken(host, driver, device)
    driver.mark(device, [(0, 1), (MIB, 1)])
    driver.update_map(device, held=True)
    assert _changed(device, 0) == [(0, 65536), (MIB, 65536)]


def test_all_snapshots_are_collected_however_many(host: Host) -> None:
    driver, devices = host.driver(), []
    for number in range(18):
        disk = host.kernel.add_disk(f"vd{number}", MIB, (253, number))
        device = host.tracked(disk)
        driver.attach(device)
        devices.append(driver.create(str(host.directory / "storage"), 16 * MIB, [device]).uuid)
    assert sorted(driver.collect()) == sorted(devices)  # type: ignore[attr-defined]


def test_no_image_is_not_some_image(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = driver.create(str(host.directory / "storage"), LIMIT, [device])
    assert driver.image(held, device).node is None


# -- events and storage ---------------------------------------------------------------------------


def test_overflow_is_told_once_and_seen_in_the_image(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device, limit=3 * MIB)
    for offset in range(0, 4 * MIB, CHUNK):
        host.kernel.write(host.disk, offset, b"x")
    seen = []
    while (event := driver.next_event(held, 1)) is not None or len(seen) < 1:
        seen.append(event)
    corrupted = [event for event in seen if event and event.name == "corrupted"]
    assert [(event.device, event.error_code) for event in corrupted] == [((8, 16), -errno.ENOSPC)]
    if host.module.generation is CURRENT:
        assert [event.requested for event in seen if event and event.name == "no_space"] == [3 * MIB]


def test_waiting_for_nothing_ends(host: Host) -> None:
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device)
    assert driver.next_event(held, 1) is None
    driver.destroy(held, [device])
    with pytest.raises(NotFoundError) as caught:
        driver.next_event(held, 1)
    assert caught.value.errno == errno.ESRCH


@pytest.mark.root
@pytest.mark.parametrize("generation", ["v5", "v2"])
def test_storage_is_handed_over_bit_by_bit_up_to_the_limit(make_host: Callable[[str], Host], generation: str) -> None:
    host = make_host(generation)
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device, limit=2 * MIB)
    file = Path(held.notes["file"])
    assert file.stat().st_size == MIB
    with pytest.raises(PermissionError), file.open("r+b"):
        pass
    for offset in range(0, MIB, CHUNK):
        host.kernel.write(host.disk, offset, b"x")
    assert driver.next_event(held, 1) is None
    assert file.stat().st_size == 2 * MIB
    for offset in range(MIB, 2 * MIB, CHUNK):
        host.kernel.write(host.disk, offset, b"x")
    full = driver.next_event(held, 1)
    assert full is not None
    assert (full.name, full.requested) == ("no_space", 2 * MIB)
    driver.destroy(held, [device])
    assert not file.exists()


@pytest.mark.root
def test_nothing_is_handed_over_twice_whoever_died(make_host: Callable[[str], Host]) -> None:
    host = make_host("v5")
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device, limit=4 * MIB)
    remembered = Held(held.uuid, held.storage, held.limit, dict(held.notes))
    for offset in range(0, MIB, CHUNK):
        host.kernel.write(host.disk, offset, b"x")
    assert driver.next_event(held, 1) is None
    (snapshot,) = host.module.snapshots.values()
    assert snapshot.capacity == 2 * MIB
    for offset in range(MIB, 2 * MIB, CHUNK):
        host.kernel.write(host.disk, offset, b"x")
    assert host.driver().next_event(remembered, 1) is None
    starts = [start for start, _ in snapshot.ranges]
    assert len(set(starts)) == len(starts)
    assert snapshot.capacity == 3 * MIB
    host.driver().destroy(remembered, [device])
    assert list((host.directory / "storage").iterdir()) == []


@pytest.mark.root
@pytest.mark.parametrize("generation", ["v5", "v2"])
def test_storage_stays_while_somebody_else_keeps_the_snapshot_alive(
    make_host: Callable[[str], Host], generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back earlier, its sectors would be overwritten under whoever gets them next."""
    host = make_host(generation)
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device)
    (snapshot,) = host.module.snapshots.values()
    snapshot.waiters = 1
    monkeypatch.setattr(feeding, "RELEASE_PATIENCE", 0.0)
    with pytest.raises(BusyError, match="somebody still waits"):
        driver.destroy(held, [device])
    file = Path(held.notes["file"])
    with pytest.raises(PermissionError):
        file.unlink()
    host.module.release(snapshot)
    with pytest.raises(NotFoundError):
        driver.destroy(held, [device])
    assert not file.exists()


@pytest.mark.root
def test_storage_stays_immutable_when_it_cannot_grow(
    make_host: Callable[[str], Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("v5")
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device)
    for offset in range(0, MIB, CHUNK):
        host.kernel.write(host.disk, offset, b"x")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr("os.posix_fallocate", full)
    event = driver.next_event(held, 1)
    assert event is not None
    assert event.name == "no_space"
    with pytest.raises(PermissionError):
        Path(held.notes["file"]).unlink()


@pytest.mark.root
def test_storage_of_a_snapshot_that_is_gone_is_given_back(make_host: Callable[[str], Host]) -> None:
    host = make_host("v5")
    driver, device = host.driver(), host.tracked()
    driver.attach(device)
    held = _taken(host, driver, device)
    host.module.release(host.module.snapshots.popitem()[1])
    with pytest.raises(NotFoundError):
        driver.destroy(held, [device])
    assert list((host.directory / "storage").iterdir()) == []


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "number", "kind"),
    [
        ("attach", errno.EBUSY, BusyError),
        ("attach", errno.ENOENT, UnsupportedError),
        ("attach", errno.EIO, StasisError),
        ("cbtinfo", errno.ESRCH, StateError),
        ("create", errno.ENOSPC, StorageError),
        ("create", errno.EOPNOTSUPP, StorageError),
        ("add", errno.EPERM, UnsupportedError),
        ("add", errno.EBUSY, BusyError),
        ("take", errno.EFAULT, StorageError),
        ("take", errno.ENODEV, StateError),
    ],
)
def test_errnos_have_the_meaning_of_the_table(newest: Host, call: str, number: int, kind: type[StasisError]) -> None:
    driver, device = newest.driver(), newest.tracked()
    if call not in ("attach", "cbtinfo"):
        driver.attach(device)
    newest.kernel.refused[call] = number
    with pytest.raises(kind) as caught:
        _attach_and_take(newest, driver, device)
    assert caught.value.errno == number
    assert type(caught.value) is kind
    assert caught.value.message.startswith(f"blksnap refuses {call} of ")
    newest.kernel.refused.clear()
    assert driver.collect() == [] or call == "take"  # type: ignore[attr-defined]


def test_a_device_is_in_one_snapshot(filtered: Host) -> None:
    driver, device = filtered.driver(), filtered.tracked()
    driver.attach(device)
    held = driver.create(str(filtered.directory / "storage"), LIMIT, [device])
    with pytest.raises(BusyError, match="another snapshot"):
        driver.create(str(filtered.directory / "storage"), LIMIT, [device])
    with pytest.raises(BusyError, match="in this snapshot already"):
        driver.add(held, device)
    driver.take(held, [device])
    with pytest.raises(StateError, match="already taken"):
        driver.take(held, [device])
