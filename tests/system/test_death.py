# SPDX-License-Identifier: Apache-2.0
"""Processes that die at random points under load lose nothing that was promised.

Promised are: flushed writes, a change map that covers every change, a snapshot image that stays right, clients that go
on once they reconnect, and nothing left behind at the end. STASIS_LONG=1 makes it a hundred deaths of each kind.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from stasis.nbd.client import Client
from tests.daemon.helpers import alive, kill
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import LONG, MIB, Disk, Load, snapshot, wait_until

ROUNDS = 100 if LONG else 3


def _image_pid(stasis: Stasis, uuid: str) -> int:
    entry = json.loads((stasis.run_dir / "snapshots" / uuid / "snapshot.json").read_text())
    return int(entry["members"][0]["image_pid"])


def _victims(stasis: Stasis, disk: Disk, uuid: str, kind: str) -> list[int]:
    """The processes to kill. What a dead daemon knew is in its directory."""
    pids = []
    if "worker" in kind:
        pids.append(int(stasis.json("device", "show", disk.name)["pid"]))
    if "image" in kind:
        wait_until(lambda: alive(_image_pid(stasis, uuid)), "the replacement of the image server")
        pids.append(_image_pid(stasis, uuid))
    if "daemon" in kind:
        pids.append(stasis.daemon_pid() or 0)
    return pids


def _death(stasis: Stasis, disk: Disk, load: Load, uuid: str, kind: str, chance: random.Random) -> None:
    pids = _victims(stasis, disk, uuid, kind)
    chance.shuffle(pids)
    load.wait_for(chance.randint(1, 8))
    time.sleep(chance.random() * 0.05)  # any point of a write, not only those after a flush
    for pid in pids:
        kill(pid)
    stasis("device", "list")  # starts a daemon where none is left
    load.wait_for(5)


def _assert_covered(stasis: Stasis, disk: Disk, reference: bytes, now: bytes) -> None:
    """Every tracking block in which the disk differs from the reference is in `map changed`."""
    extents = stasis.json("map", "changed", disk.name, "--since", "1")
    covered = {block for e in extents for block in range(e["offset"] >> 16, -(-(e["offset"] + e["length"]) >> 16))}
    differing = {o >> 16 for o in range(0, disk.size, 1 << 16) if now[o : o + 65536] != reference[o : o + 65536]}
    assert differing <= covered
    assert differing


def _image_is(disk: Disk, uri: str, reference: bytes) -> bool:
    try:
        return disk.read(uri) == reference
    except OSError:
        return False  # its server is being replaced


@pytest.mark.expects_errors("died; starting it again", "the image server of")
@pytest.mark.parametrize("kind", ["worker", "image", "daemon", "worker and image"])
def test_death_under_load(stasis: Stasis, make_disk: MakeDisk, storage: Path, kind: str, seed: int) -> None:
    disk = make_disk("disk.img", 8 * MIB)
    chance = random.Random(f"{seed} {kind}")
    reference = bytes(disk.expected)
    with snapshot(stasis, storage, disk.name, limit="64M") as taken:
        with Load(disk) as load:
            for _ in range(ROUNDS):
                _death(stasis, disk, load, taken["id"], kind, chance)
        now = disk.path.read_bytes()
        assert now == disk.expected, f"flushed writes are lost (seed {seed})"
        assert load.reconnections > 0 or "worker" not in kind
        _assert_covered(stasis, disk, reference, now)
        image = stasis.json("snapshot", "show", taken["id"])["devices"][0]
        assert image["error_code"] == 0
        assert image["generation"] == taken["devices"][0]["generation"]
        wait_until(lambda: _image_is(disk, image["uri"], reference), "the right image")
    assert disk.read() == disk.expected


@pytest.mark.expects_errors("")
def test_death_of_the_daemon_and_a_worker_loses_no_write_and_no_change(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, seed: int
) -> None:
    """The old contents that nobody saved meanwhile make the image unreadable; it never shows wrong bytes."""
    disk = make_disk("disk.img", 8 * MIB)
    chance = random.Random(seed)
    for _ in range(max(2, ROUNDS // 2)):
        reference = bytes(disk.expected)
        with snapshot(stasis, storage, disk.name, limit="64M") as taken:
            with Load(disk) as load:
                _death(stasis, disk, load, taken["id"], "daemon and worker", chance)
            now = disk.path.read_bytes()
            assert now == disk.expected, f"flushed writes are lost (seed {seed})"
            _assert_covered_since(stasis, disk, taken, reference, now)
            shown = stasis.json("snapshot", "show", taken["id"])
            if shown["error_code"] == 0:
                assert disk.read(shown["devices"][0]["uri"]) == reference
            else:
                with pytest.raises(OSError):
                    disk.read(shown["devices"][0]["uri"])


def _assert_covered_since(stasis: Stasis, disk: Disk, taken: dict[str, object], reference: bytes, now: bytes) -> None:
    number = taken["devices"][0]["change_number"]  # type: ignore[index]
    extents = stasis.json("map", "changed", disk.name, "--since", str(number))
    for offset in range(0, disk.size, 1 << 16):
        if now[offset : offset + 65536] != reference[offset : offset + 65536]:
            assert any(e["offset"] <= offset < e["offset"] + e["length"] for e in extents)


@pytest.mark.expects_errors("the image server of")
def test_the_next_daemon_finds_an_image_server_that_replaced_another(
    stasis: Stasis, make_disk: MakeDisk, storage: Path
) -> None:
    """It must not start a second one: the first would run on for ever."""
    disk = make_disk("disk.img", MIB)
    with snapshot(stasis, storage, disk.name) as taken:
        first = _image_pid(stasis, taken["id"])
        kill(first)
        wait_until(lambda: _image_pid(stasis, taken["id"]) != first, "the replacement of the image server")
        second = _image_pid(stasis, taken["id"])
        kill(stasis.daemon_pid() or 0)
        stasis("device", "list")
        assert _image_pid(stasis, taken["id"]) == second
        assert alive(second)
        assert disk.read(taken["devices"][0]["uri"]) == disk.expected
    assert not alive(second)


@pytest.mark.expects_errors("died; starting it again")
def test_image_writes_survive_the_worker(stasis: Stasis, make_disk: MakeDisk, storage: Path) -> None:
    disk = make_disk("disk.img", 4 * MIB)
    with snapshot(stasis, storage, disk.name) as taken:
        uri = taken["devices"][0]["uri"]
        with Client.connect(uri) as image:
            image.pwrite(MIB, b"scratch " * 512)
            image.flush()
        kill(int(stasis.json("device", "show", disk.name)["pid"]))
        expected = bytearray(disk.expected)
        expected[MIB : MIB + 4096] = b"scratch " * 512
        wait_until(lambda: _image_is(disk, uri, bytes(expected)), "the right image")
    assert disk.read() == disk.expected


@pytest.mark.expects_errors("died; starting it again", "the image server of", "was taking when")
def test_a_daemon_killed_at_any_point_of_create_or_destroy_leaves_nothing(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, seed: int
) -> None:
    disk = make_disk("disk.img", 4 * MIB)
    chance = random.Random(seed)
    with Load(disk) as load:
        for number in range(ROUNDS * 2):
            command = ["snapshot", "create", "--storage", storage, "--limit", "64M", disk.name, "--take"]
            if number % 2:
                uuids = stasis.json("snapshot", "collect")
                command = ["snapshot", "destroy", *uuids] if uuids else ["device", "list"]
            _kill_during(stasis, command, chance)
            load.wait_for(3)
        for uuid in stasis.json("snapshot", "collect"):
            stasis("snapshot", "destroy", uuid)
        with snapshot(stasis, storage, disk.name):
            load.wait_for(3)
    assert disk.path.read_bytes() == disk.expected
    assert list((stasis.run_dir / "snapshots").iterdir()) == []
    assert list(storage.iterdir()) == []
    assert [path.name for path in (stasis.run_dir / "nbd").iterdir()] == [f"{disk.name}.sock"]


def _kill_during(stasis: Stasis, command: list[str | Path], chance: random.Random) -> None:
    pid = stasis.daemon_pid()
    with stasis.popen(*command) as running:
        time.sleep(0.07 + chance.random() * 0.08)  # the command starts Python, then the daemon works for some 30 ms
        if pid is not None:
            kill(pid)
        running.communicate(timeout=60)  # whether it was done is the point of time's choice
