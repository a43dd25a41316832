# SPDX-License-Identifier: Apache-2.0
"""A chain of incremental copies stays equal to the images, and what cannot be continued is refused."""

from __future__ import annotations

import json
import uuid as uuids
from pathlib import Path
from typing import Any

import pytest

import stasis as api
from stasis.errors import ExitCode
from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import LONG, MIB, Disk, Load, snapshot


def _copy(stasis: Stasis, taken: dict[str, Any], target: Path, *options: str) -> dict[str, Any]:
    """Copy with --json; the summary line."""
    output = stasis("snapshot", "copy", taken["id"], taken["devices"][0]["name"], target, *options, "--json")
    summary: dict[str, Any] = json.loads(output.splitlines()[-1])
    return summary


def _change(disk: Disk, count: int) -> None:
    with Client.connect(disk.uri, timeout=30) as client:
        disk.change(client, count)
        client.flush()


@pytest.mark.parametrize("options", [(), ("--buffered",), ("--tracking-block", "256K")])
@pytest.mark.parametrize("size", [16 * MIB, 5 * MIB + 4097])
def test_five_epochs(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, short_dir: Path, size: int, options: tuple[str, ...]
) -> None:
    disk, target = make_disk("disk.img", size, *options), short_dir / "target.img"
    for epoch in range(20 if LONG else 5):
        with snapshot(stasis, storage, disk.name) as taken:
            image = bytes(disk.expected)
            _change(disk, 10)  # while it is copied: belongs to the next epoch
            since = ["--since", str(epoch), "--verify"] if epoch else []
            summary = _copy(stasis, taken, target, *since)
            assert taken["devices"][0]["change_number"] == epoch + 1
            assert target.read_bytes() == image
            assert disk.read(taken["devices"][0]["uri"]) == image
            assert epoch == 0 or summary["bytes_copied"] < size
        _change(disk, 5)
    assert disk.read() == disk.expected


def test_an_epoch_can_be_left_out_and_repeated(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, short_dir: Path
) -> None:
    disk, target = make_disk("disk.img", 4 * MIB), short_dir / "target.img"
    with snapshot(stasis, storage, disk.name) as taken:
        _copy(stasis, taken, target)
    for _ in range(2):
        _change(disk, 10)
        with snapshot(stasis, storage, disk.name) as taken:
            image = bytes(disk.expected)
    _change(disk, 10)
    with snapshot(stasis, storage, disk.name) as taken:
        image = bytes(disk.expected)
        for _ in range(2):
            _copy(stasis, taken, target, "--since", "1")
            assert target.read_bytes() == image


def test_writes_to_an_image_come_back_in_line_with_the_next_copy(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, short_dir: Path
) -> None:
    disk, target = make_disk("disk.img", 4 * MIB), short_dir / "target.img"
    with snapshot(stasis, storage, disk.name) as taken:
        with Client.connect(taken["devices"][0]["uri"]) as image:
            image.pwrite(MIB, b"scratch!" * 512)
        _copy(stasis, taken, target)
        assert target.read_bytes() != disk.expected
    with snapshot(stasis, storage, disk.name) as taken:
        _copy(stasis, taken, target, "--since", "1")
        assert target.read_bytes() == disk.expected


def test_copies_under_load_are_the_instant_of_the_take(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, short_dir: Path
) -> None:
    disk, target = make_disk("disk.img", 8 * MIB), short_dir / "target.img"
    with Load(disk) as load:
        for epoch in range(4):
            load.wait_for(10)
            with snapshot(stasis, storage, disk.name) as taken:
                _copy(stasis, taken, target, *(["--since", str(epoch)] if epoch else []))
                load.wait_for(10)
                assert target.read_bytes() == disk.read(taken["devices"][0]["uri"])
    assert disk.path.read_bytes() == disk.expected


def test_what_cannot_be_continued_is_refused_and_the_target_left_alone(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, short_dir: Path
) -> None:
    disk, target, strange = make_disk("disk.img", 2 * MIB), short_dir / "target.img", short_dir / "strange.img"
    with snapshot(stasis, storage, disk.name) as taken:
        _copy(stasis, taken, target)
    for _ in range(2):
        _change(disk, 5)
        with snapshot(stasis, storage, disk.name) as taken:
            before = target.read_bytes()
            copy = ["snapshot", "copy", taken["id"], disk.name]
            stasis.fail(ExitCode.GENERATION, *copy, target, "--since", "9")
            stasis.fail(ExitCode.GENERATION, *copy, target, "--since", "1", "--generation", str(uuids.uuid4()))
            assert target.read_bytes() == before
    with snapshot(stasis, storage, disk.name) as taken:
        gap = stasis.fail(ExitCode.GENERATION, "snapshot", "copy", taken["id"], disk.name, target, "--since", "2")
        assert "--since 1" in gap
        strange.write_bytes(bytes(2 * MIB))  # not the base it is said to be: the sample finds out
        stasis.fail(ExitCode.VERIFY, "snapshot", "copy", taken["id"], disk.name, strange, "--since", "2")
        assert strange.read_bytes() == bytes(2 * MIB)
        assert target.read_bytes() == before


@pytest.mark.slow
def test_after_255_takes_the_generation_changes_and_a_copy_must_be_whole(
    stasis: Stasis, make_disk: MakeDisk, short_dir: Path
) -> None:
    disk, target = make_disk("disk.img", 4 * 65536), short_dir / "target.img"
    with snapshot(stasis, "memory", disk.name, limit="16M") as first:
        _copy(stasis, first, target)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        for _ in range(254):
            taken = client.create_snapshot("memory", [disk.name], limit=16 * MIB, take=True)
            client.destroy(taken.id)
        assert taken.device(disk.name).change_number == 255
        assert taken.device(disk.name).wrapped  # what is written from here on belongs to the next generation
        assert taken.device(disk.name).generation == first["devices"][0]["generation"]
    _change(disk, 5)
    with snapshot(stasis, "memory", disk.name, limit="16M") as wrapped:
        device = wrapped["devices"][0]
        assert (device["change_number"], device["wrapped"]) == (1, False)
        assert device["generation"] != first["devices"][0]["generation"]
        stasis.fail(ExitCode.GENERATION, "snapshot", "copy", wrapped["id"], disk.name, target, "--since", "1")
        _copy(stasis, wrapped, target)
        assert target.read_bytes() == disk.expected
    _change(disk, 5)
    with snapshot(stasis, "memory", disk.name, limit="16M") as taken:
        _copy(stasis, taken, target, "--since", str(device["change_number"]))
        assert target.read_bytes() == disk.expected
