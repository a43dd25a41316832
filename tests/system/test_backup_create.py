# SPDX-License-Identifier: Apache-2.0
"""`stasis backup create` as users run it: served disks under load, every kind of source, and every way to end early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stasis as api
from stasis.backup.job import CreateResult, SampleOptions
from stasis.backup.repo import Repository, Secrets
from stasis.daemon.backups import BackupJob
from stasis.daemon.backups import back_up as daemon_back_up
from stasis.daemon.sources import SnapshotStorage
from stasis.errors import BusyError, ExitCode, LockedError, NotFoundError, StasisError, StorageError, UsageError
from stasis.nbd.client import Client
from tests.backup.tracked import restored
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import MIB, Disk, Load, fio_command, snapshot, wait_until


@pytest.fixture
def repo(stasis: Stasis, short_dir: Path) -> Path:
    """A repository with small chunks that the command line uses."""
    path = short_dir / "repo"
    stasis("repo", "init", path, "--no-encryption", "--chunk-size", "64K")
    stasis.environment["STASIS_REPO"] = str(path)
    return path


@pytest.fixture
def opened(repo: Path) -> Iterator[Repository]:
    with Repository.open(str(repo), Secrets.from_environment(None, None)) as repository:
        yield repository


def create(stasis: Stasis, *arguments: str | Path, code: ExitCode = ExitCode.OK) -> dict[str, Any]:
    """A backup; its summary line."""
    result = stasis.run("backup", "create", *arguments, "--json")
    assert result.returncode == code, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert summary["message_type"] == "summary"
    return summary


def back_up(stasis: Stasis, repository: Repository, *sources: str | Path, **fields: Any) -> CreateResult:
    """The same without the start of a command."""
    job = BackupJob([str(source) for source in sources], run_dir=stasis.run_dir, state_dir=stasis.state_dir, **fields)
    return daemon_back_up(job, repository)


def contents(repository: Repository, backup: dict[str, Any]) -> bytes:
    return restored(repository, repository.backup(backup["id"]))


def change(disk: Disk, count: int = 10) -> None:
    with Client.connect(disk.uri) as client:
        disk.change(client, count)


def no_snapshot_is_left(stasis: Stasis) -> None:
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        assert client.collect() == []


def wait_for_snapshot(stasis: Stasis) -> None:
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        wait_until(lambda: bool([one for one in client.snapshots() if one.state == "taken"]), "a snapshot")


def test_a_chain_of_backups_of_a_disk_that_is_written_to(
    stasis: Stasis, make_disk: MakeDisk, opened: Repository
) -> None:
    disk = make_disk("disk.img", 6 * MIB + 12288)
    for kind in ("full", "incremental", "incremental"):
        planned = create(stasis, disk.name, "--dry-run")["plans"][0]
        (backup,) = create(stasis, disk.name, "--tag", "nightly")["backups"]
        assert contents(opened, backup) == disk.expected
        assert (backup["kind"], planned["kind"], backup["tags"]) == (kind, kind, ["nightly"])
        assert planned["bytes_to_read"] == backup["statistics"]["bytes_read"]
        change(disk, 5)
    (backup,) = create(stasis, disk.path, "--kind", "differential")["backups"]  # its path means the served device
    assert (backup["kind"], backup["device"], backup["source"]) == ("differential", disk.name, "served")
    assert contents(opened, backup) == disk.expected
    no_snapshot_is_left(stasis)


def test_backups_under_load_hold_one_instant_and_lose_nothing(
    stasis: Stasis, make_disk: MakeDisk, opened: Repository
) -> None:
    disk = make_disk("disk.img", 8 * MIB)
    with Load(disk) as load:
        for _ in range(3):
            load.wait_for(10)
            back_up(stasis, opened, disk.name, sample=SampleOptions(1.0))
        load.wait_for(10)
    (last,) = back_up(stasis, opened, disk.name).backups
    assert last.kind == "incremental"
    assert restored(opened, last) == disk.expected


@pytest.mark.tool("fio")
def test_increments_while_fio_writes_are_the_images_of_their_snapshots(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, opened: Repository
) -> None:
    disk = make_disk("disk.img", 8 * MIB)
    mixed = ("--time_based", "--runtime=600", "--verify=0", "--rate=2m", "--bssplit=4k/80:64k/20")
    command = fio_command(disk.uri, *mixed)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as writer:
        try:
            kinds = [_one_round(stasis, disk, storage, opened) for _ in range(4)]
        finally:
            writer.terminate()
    assert kinds == ["full", "incremental", "incremental", "incremental"]


def _one_round(stasis: Stasis, disk: Disk, storage: Path, repository: Repository) -> str:
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        written = client.map_info(disk.name).change_number
        wait_until(lambda: bool(client.changed_extents(disk.name, written)), "a write")
        taken = client.create_snapshot(storage, [disk.name], limit=64 * MIB, take=True)
        try:
            (backup,) = back_up(stasis, repository, f"{taken.id}:{disk.name}").backups
            assert restored(repository, backup) == disk.read(taken.device(disk.name).uri)
        finally:
            client.destroy(taken.id)
    return backup.kind


def test_several_disks_and_a_file_are_one_set(
    stasis: Stasis, make_disk: MakeDisk, short_dir: Path, opened: Repository
) -> None:
    disks = [make_disk(name, MIB) for name in ("a.img", "b.img")]
    plain = short_dir / "plain.img"
    plain.write_bytes(b"plain" * 100_000)
    result = back_up(stasis, opened, "a", "b", plain)
    assert [backup.device for backup in result.backups] == ["a", "b", "plain.img"]
    assert {backup.set_id for backup in result.backups} == {result.set_id}
    expected = [bytes(disk.expected) for disk in disks] + [plain.read_bytes()]
    assert [restored(opened, backup) for backup in result.backups] == expected
    assert len({backup.time for backup in result.backups[:2]}) == 1


def test_a_snapshot_that_exists_is_backed_up_and_stays(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, opened: Repository
) -> None:
    disk = make_disk("disk.img", 2 * MIB)
    back_up(stasis, opened, disk.name)
    with snapshot(stasis, storage, disk.name) as taken:
        image = bytes(disk.expected)
        change(disk)
        (first,) = back_up(stasis, opened, f"{taken['id'][:8]}:{disk.name}").backups
        assert (first.kind, first.source_kind) == ("incremental", "snapshot")
        assert restored(opened, first) == image
        with Client.connect(taken["devices"][0]["uri"]) as client:
            client.pwrite(MIB, b"scratch!" * 512)
        (second,) = back_up(stasis, opened, f"{taken['id']}:{disk.name}").backups
        assert second.parent == first.id
        assert restored(opened, second) == disk.read(taken["devices"][0]["uri"])
        assert stasis("snapshot", "collect") == taken["id"]
        with pytest.raises(BusyError) as caught:
            back_up(stasis, opened, disk.name)
        assert "UUID:NAME" in caught.value.hint
    (last,) = back_up(stasis, opened, disk.name).backups
    assert restored(opened, last) == disk.expected


def test_a_device_that_grew_is_backed_up_whole_and_then_goes_on(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, opened: Repository
) -> None:
    disk = make_disk("disk.img", MIB)
    back_up(stasis, opened, disk.name)
    with snapshot(stasis, storage, disk.name) as taken, api.connect(stasis.run_dir, stasis.state_dir) as client:
        image = bytes(disk.expected)
        os.truncate(disk.path, 2 * MIB)
        wait_until(lambda: client.map_info(disk.name).capacity == 2 * MIB, "the new size")
        (backup,) = back_up(stasis, opened, f"{taken['id']}:{disk.name}").backups  # its map went with the old size
        assert (backup.kind, restored(opened, backup)) == ("full", image)
    (backup,) = back_up(stasis, opened, disk.name).backups
    assert (backup.kind, restored(opened, backup)) == ("full", image + bytes(MIB))
    assert "the size changed from 1 MiB to 2 MiB" in backup.note
    assert back_up(stasis, opened, disk.name).backups[0].kind == "incremental"


def test_standard_input_is_backed_up_under_its_name(stasis: Stasis, opened: Repository) -> None:
    process = stasis.popen("backup", "create", "-", "--name", "dump", "--json", stdin=subprocess.PIPE)
    out, err = process.communicate("dump\n" * 300_000)
    assert process.returncode == 0, err
    (backup,) = json.loads(out.splitlines()[-1])["backups"]
    assert contents(opened, backup) == b"dump\n" * 300_000


def test_a_write_behind_the_back_of_tracking_ends_in_a_full_backup(
    stasis: Stasis, make_disk: MakeDisk, opened: Repository
) -> None:
    disk = make_disk("disk.img", 2 * MIB)
    back_up(stasis, opened, disk.name)
    with disk.path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"unseen", MIB)
    disk.expected[MIB : MIB + 6] = b"unseen"
    summary = create(stasis, disk.name, "--self-check", "100", code=ExitCode.TRACKING)
    (backup,) = summary["backups"]
    assert (backup["kind"], backup["generation"]) == ("full", None)
    assert "change tracking is wrong" in summary["warnings"][0]
    assert contents(opened, backup) == disk.expected
    assert stasis.json("map", "changed", disk.name, "--since", "1") == [{"offset": 0, "length": 2 * MIB}]
    assert [back_up(stasis, opened, disk.name).backups[0].kind for _ in range(2)] == ["full", "incremental"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_snapshot_and_all_changes(
    ending: signal.Signals, stasis: Stasis, make_disk: MakeDisk, opened: Repository
) -> None:
    disk = make_disk("disk.img", 4 * MIB)
    back_up(stasis, opened, disk.name)
    change(disk)
    slow = ("backup", "create", disk.name, "--kind", "full", "--limit-rate", "256K")
    with stasis.popen(*slow) as process:
        wait_for_snapshot(stasis)
        with pytest.raises(LockedError, match="is running already"):
            back_up(stasis, opened, disk.name)
        process.send_signal(ending)
        process.communicate(timeout=60)
    assert process.returncode == (-9 if ending == signal.SIGKILL else ExitCode.INTERRUPTED)
    if ending != signal.SIGKILL:
        no_snapshot_is_left(stasis)
    change(disk)
    (backup,) = back_up(stasis, opened, disk.name).backups
    assert backup.kind == "incremental"
    assert restored(opened, backup) == disk.expected
    no_snapshot_is_left(stasis)


def test_a_snapshot_that_overflows_fails_the_backup_and_not_the_disk(
    stasis: Stasis, make_disk: MakeDisk, opened: Repository
) -> None:
    stasis("settings", "set", "diff_storage_minimum=1048576")
    disk = make_disk("disk.img", 4 * MIB)
    back_up(stasis, opened, disk.name)
    slow = ("backup", "create", disk.name, "--kind", "full", "--limit-rate", "256K", "--storage", "memory", "--limit",
            "1M", "--on-read-error", "skip")
    with stasis.popen(*slow) as process:
        wait_for_snapshot(stasis)
        with Client.connect(disk.uri) as client:
            disk.write(client, 0, os.urandom(disk.size))
        _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STORAGE, err
    assert "--limit" in err
    (backup,) = back_up(stasis, opened, disk.name).backups
    assert backup.kind == "incremental"
    assert restored(opened, backup) == disk.expected
    no_snapshot_is_left(stasis)


def test_hooks_run_around_the_snapshot(
    stasis: Stasis, make_disk: MakeDisk, short_dir: Path, opened: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_take(*_: object) -> None:
        raise StorageError("no room")

    disk, seen = make_disk("disk.img", MIB), short_dir / "seen"
    note = f'echo "$STASIS_DEVICES $STASIS_SNAPSHOT" >> {seen}'
    (backup,) = create(stasis, disk.name, "--pre-snapshot", note, "--post-snapshot", note)["backups"]
    assert (seen.read_text(), backup["consistency"]) == ("disk \ndisk taken\n", "hooks")
    with pytest.raises(StasisError, match="status 1"):
        back_up(stasis, opened, disk.name, before="exit 1", after=note)
    with pytest.raises(StorageError):
        back_up(stasis, opened, disk.name, storage=SnapshotStorage("memory", 4096), before=note, after=note)
    assert seen.read_text().endswith("disk taken\ndisk failed\n")  # nothing had been brought to rest yet
    with monkeypatch.context() as patch:
        patch.setattr(api.Client, "take", no_take)
        with pytest.raises(StorageError):
            back_up(stasis, opened, disk.name, after=note)
    assert seen.read_text().endswith("disk taken\ndisk failed\ndisk failed\n")
    summary = create(stasis, disk.name, "--post-snapshot", "exit 7", code=ExitCode.FAILURE)
    assert "status 7" in summary["warnings"][0]
    assert len(summary["backups"]) == 1


def test_what_cannot_be_done_is_said_in_a_sentence(
    stasis: Stasis, make_disk: MakeDisk, opened: Repository, short_dir: Path
) -> None:
    disk = make_disk("disk.img", MIB)
    said = stasis.fail(ExitCode.GENERATION, "backup", "create", disk.name, "--kind", "incremental")
    assert "no earlier backup" in said
    stasis.fail(ExitCode.REPOSITORY, "backup", "create", disk.name, "--repo", short_dir / "none")
    stasis.fail(ExitCode.USAGE, "backup", "create", disk.name, "--limit-rate", "0")
    stasis.fail(ExitCode.USAGE, "backup", "create", disk.name, "--base", "abcd")
    with pytest.raises(NotFoundError, match="no served device and no file nothing"):
        back_up(stasis, opened, "nothing")
    for words, name in ((("disk", disk.path), None), (("disk", short_dir / "repo" / "config"), "both"), (("-",), None)):
        with pytest.raises(UsageError):
            back_up(stasis, opened, *words, name=name)
    no_snapshot_is_left(stasis)
