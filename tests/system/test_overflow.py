# SPDX-License-Identifier: Apache-2.0
"""A difference storage that fills up costs the snapshot, in steps that are told, and never the origin."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import MIB, fio, wait_until


@contextmanager
def watching(stasis: Stasis, uuid: str) -> Iterator[subprocess.Popen[str]]:
    """`snapshot watch`, ended if the test fails before it ends by itself."""
    with stasis.popen("snapshot", "watch", uuid, "--json") as watcher:
        try:
            yield watcher
        finally:
            watcher.kill()


@pytest.mark.tool("fio")
@pytest.mark.parametrize("kind", ["memory", "directory", "file"])
def test_events_error_code_and_a_disk_that_goes_on(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, kind: str
) -> None:
    stasis("settings", "set", "diff_storage_minimum=1048576")
    disk = make_disk("disk.img", 16 * MIB)
    place = {"memory": "memory", "directory": str(storage), "file": str(storage / "file")}[kind]
    uuid = stasis("snapshot", "create", "--storage", place, "--limit", "4M", disk.name, "--take")
    image = stasis.json("snapshot", "show", uuid)["devices"][0]["uri"]
    with watching(stasis, uuid) as watcher, Client.connect(image) as reader:
        assert reader.pread(0, MIB) == disk.expected[:MIB]
        assert fio(disk.uri, "--size=16m")["write"]["total_ios"] == 4096
        wait_until(lambda: stasis.json("snapshot", "show", uuid)["state"] == "corrupted", "the overflow")
        shown = stasis.json("snapshot", "show", uuid)
        assert shown["error_code"] == shown["devices"][0]["error_code"] == -errno.ENOSPC
        assert shown["storage"]["filled"] <= 4 * MIB
        for client in (reader, Client.connect(image)):
            with pytest.raises(OSError) as caught:
                client.pread(0, 4096)
            assert caught.value.errno == errno.EIO
            client.close()
        message = stasis.fail(ExitCode.STORAGE, "snapshot", "copy", uuid, disk.name, storage / "copy.img")
        assert "take a new snapshot" in message
        stasis("snapshot", "destroy", uuid)
        output, _ = watcher.communicate(timeout=30)
        assert watcher.returncode == 0
    events = [json.loads(line) for line in output.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-2:] == ["no_space", "corrupted"]
    assert set(kinds[:-2]) == {"low_space"}
    assert events[-1]["error_code"] == -errno.ENOSPC
    assert events[-1]["device"] == disk.name
    with Client.connect(disk.uri) as client:
        client.pwrite(0, b"goes on!" * 512)
    assert disk.read() == disk.path.read_bytes()


def test_one_full_snapshot_leaves_others_alone(stasis: Stasis, make_disk: MakeDisk, storage: Path) -> None:
    stasis("settings", "set", "diff_storage_minimum=131072")
    full, other = make_disk("full.img", 4 * MIB), make_disk("other.img", 4 * MIB)
    reference = bytes(other.expected)
    small = stasis("snapshot", "create", "--storage", "memory", "--limit", "128K", full.name, "--take")
    large = stasis("snapshot", "create", "--storage", "memory", "--limit", "64M", other.name, "--take")
    for disk in (full, other):
        with Client.connect(disk.uri) as client:
            disk.write(client, 0, disk.random.randbytes(4 * MIB))
    wait_until(lambda: stasis.json("snapshot", "show", small)["error_code"] == -errno.ENOSPC, "the overflow")
    shown = stasis.json("snapshot", "show", large)
    assert (shown["state"], shown["error_code"]) == ("taken", 0)
    assert other.read(shown["devices"][0]["uri"]) == reference
    again = stasis("snapshot", "destroy", small)
    assert again == ""
    stasis("snapshot", "create", "--storage", "memory", "--limit", "64M", full.name, "--take")
    assert full.path.read_bytes() == full.expected


def test_discarding_what_is_empty_costs_no_storage(stasis: Stasis, short_dir: Path) -> None:
    """A discard of holes, and one of what is already saved, must not fill the storage."""
    stasis("settings", "set", "diff_storage_minimum=1048576")
    path = short_dir / "disk.img"
    path.write_bytes(b"data" * 4096)
    with path.open("r+b") as file:
        file.truncate(64 * MIB)
    uri = stasis("device", "attach", path, "--name", "disk")
    uuid = stasis("snapshot", "create", "--storage", "memory", "--limit", "1M", "disk", "--take")
    with Client.connect(uri) as client:
        for _ in range(2):
            client.trim(0, 64 * MIB)
        client.write_zeroes(0, 64 * MIB)
    shown = stasis.json("snapshot", "show", uuid)
    assert (shown["state"], shown["error_code"]) == ("taken", 0)
    with Client.connect(shown["devices"][0]["uri"]) as image:
        assert image.pread(0, 16384) == b"data" * 4096
        assert image.pread(16384, MIB) == bytes(MIB)
