# SPDX-License-Identifier: Apache-2.0
"""Settings and options do what the guide says, and disks of any size are kept and copied right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import MIB, Disk, snapshot, wait_until


def _set(stasis: Stasis, **values: int) -> None:
    stasis("settings", "set", *(f"{name}={value}" for name, value in values.items()))


def _tracking_block(stasis: Stasis, disk: Disk) -> int:
    return int(stasis.json("map", "info", disk.name)["block_size"])


@pytest.mark.parametrize(
    ("settings", "block"),
    [
        ({}, 1 << 16),
        ({"tracking_block_minimum_shift": 18}, 1 << 18),
        ({"tracking_block_maximum_count": 4}, 1 << 20),
        ({"tracking_block_maximum_count": 4, "tracking_block_maximum_shift": 17}, 1 << 17),
    ],
)
def test_tracking_blocks(stasis: Stasis, make_disk: MakeDisk, settings: dict[str, int], block: int) -> None:
    if settings:
        _set(stasis, **settings)
    assert _tracking_block(stasis, make_disk("disk.img", 4 * MIB)) == block


@pytest.mark.parametrize(
    ("settings", "options", "chunk"),
    [
        ({}, [], 1 << 16),
        ({}, ["--chunk", "256K"], 1 << 18),
        ({"chunk_minimum_shift": 17}, [], 1 << 17),
        ({"chunk_maximum_count_shift": 2}, [], 1 << 20),
        ({"chunk_maximum_count_shift": 2, "chunk_maximum_shift": 18}, [], 1 << 18),
    ],
)
def test_chunks(
    stasis: Stasis, make_disk: MakeDisk, settings: dict[str, int], options: list[str], chunk: int
) -> None:
    if settings:
        _set(stasis, **settings)
    disk = make_disk("disk.img", 4 * MIB)
    before = bytes(disk.expected)
    create = ["snapshot", "create", "--storage", "memory", "--limit", "64M", *options, disk.name, "--take"]
    (shown,) = stasis.json("snapshot", "show", stasis(*create))["devices"]
    assert shown["chunk"] == chunk
    with Client.connect(disk.uri) as client:
        disk.change(client, 30)
    assert disk.read(shown["uri"]) == before


def test_storage_grows_by_its_portion(stasis: Stasis, make_disk: MakeDisk, storage: Path) -> None:
    _set(stasis, diff_storage_minimum=2 * MIB)
    disk = make_disk("disk.img", 8 * MIB)
    with snapshot(stasis, storage, disk.name, limit="1M") as small:
        assert small["storage"]["capacity"] == MIB
    with snapshot(stasis, storage, disk.name, limit="64M") as taken:
        assert (taken["storage"]["portion"], taken["storage"]["capacity"]) == (2 * MIB, 2 * MIB)
        with Client.connect(disk.uri) as client:
            disk.write(client, 0, disk.random.randbytes(6 * MIB))
        grown = stasis.json("snapshot", "show", taken["id"])["storage"]
        assert grown["capacity"] % (2 * MIB) == 0
        assert 6 * MIB <= grown["filled"] <= grown["capacity"] <= 10 * MIB


def test_the_write_intent_log_has_its_regions_and_clears_them(stasis: Stasis, make_disk: MakeDisk) -> None:
    _set(stasis, intent_region_shift=20, intent_clear_seconds=1)
    disk = make_disk("disk.img", 8 * MIB)

    def regions() -> int:
        return int(stasis.json("device", "show", disk.name)["worker"]["intent_regions"])

    with Client.connect(disk.uri) as client:
        for megabyte in (0, 2, 5):
            client.pwrite(megabyte * MIB, bytes(4096))
    assert regions() <= 3
    wait_until(lambda: regions() == 0, "the clearing of quiet regions")


def test_connections_are_limited(stasis: Stasis, make_disk: MakeDisk) -> None:
    _set(stasis, nbd_maximum_connections=2)
    disk = make_disk("disk.img", MIB)
    with Client.connect(disk.uri, timeout=5) as first, Client.connect(disk.uri, timeout=5) as second:
        with pytest.raises(OSError):
            Client.connect(disk.uri, timeout=1)
        assert first.pread(0, 4096) == second.pread(0, 4096)


def _flags_of_origin(stasis: Stasis, disk: Disk) -> set[bool]:
    """For each descriptor that the worker has of the image file: whether its I/O is direct."""
    process = Path(f"/proc/{stasis.json('device', 'show', disk.name)['pid']}")
    found = [link.name for link in (process / "fd").iterdir() if os.readlink(link) == str(disk.path)]
    infos = [(process / "fdinfo" / name).read_text() for name in found]
    return {bool(int(info.partition("flags:")[2].split()[0], 8) & os.O_DIRECT) for info in infos}


def test_buffered_and_direct(stasis: Stasis, make_disk: MakeDisk) -> None:
    assert _flags_of_origin(stasis, make_disk("buffered.img", MIB, "--buffered")) == {False}
    direct = make_disk("direct.img", MIB)
    shown = stasis.json("device", "show", direct.name)
    if not shown["worker"]["device"]["direct"]:
        pytest.skip("the file system of the temporary directory has no direct I/O")
    assert True in _flags_of_origin(stasis, direct)


@pytest.mark.parametrize("options", [(), ("--buffered",)], ids=["direct", "buffered"])
@pytest.mark.parametrize("size", [1, 511, 4097, 77_777_777 // 11])
def test_any_size(
    stasis: Stasis, make_disk: MakeDisk, short_dir: Path, size: int, options: tuple[str, ...]
) -> None:
    disk, target = make_disk("disk.img", size, *options), short_dir / "copy.img"
    for since in ([], ["--since", "1"]):
        before = bytes(disk.expected)
        with snapshot(stasis, "memory", disk.name, limit="64M") as taken:
            with Client.connect(disk.uri) as client:
                assert client.size == size
                disk.change(client, 10)
            assert disk.read(taken["devices"][0]["uri"]) == before
            stasis("snapshot", "copy", taken["id"], disk.name, target, "--verify", *since)
            assert target.read_bytes() == before
    assert disk.read() == disk.path.read_bytes() == disk.expected
