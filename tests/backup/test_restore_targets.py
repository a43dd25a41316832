# SPDX-License-Identifier: Apache-2.0
"""Restores as users meet them: to devices, onto what is mounted, to a full disk, into a pipe, and interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import Manifest, Repository
from stasis.backup.restore import ApplyOptions, RestoreOptions, apply, restore
from stasis.backup.restore.batches import BATCH_BYTES
from stasis.errors import BusyError, ExitCode, StateError, StorageError
from stasis.linux import blockdev
from stasis.nbd.client import Client
from tests.backup.restoring import CHUNK, image, new_repository, objects, publish, sidecar_of, stopping_after
from tests.block.loops import loop_device
from tests.runner import Stasis
from tests.system.helpers import Disk
from tests.unmounting import unmount

MIB = 1 << 20
DEVICE_SIZE = 4 * MIB


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with new_repository(tmp_path / "repository") as made:
        yield made


@pytest.fixture
def commands(stasis: Stasis, repository: Repository) -> Stasis:
    """The command line, with the repository in its environment."""
    stasis.environment["STASIS_REPO"] = repository.url
    return stasis


@contextmanager
def filesystem(tmp_path: Path, size: int) -> Iterator[tuple[str, Path]]:
    """A loop device with an ext4, mounted: (device, directory)."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    with loop_device(tmp_path / "ext4", size) as device:
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
        subprocess.run(["mount", device, mounted], check=True)
        try:
            yield device, mounted
        finally:
            unmount(mounted)


# ---- block devices


@pytest.mark.root
@pytest.mark.tool("losetup")
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_device_gets_the_backup_and_keeps_what_is_behind_it(
    repository: Repository, tmp_path: Path, sector: int, in_place: bool
) -> None:
    data, after = image(DEVICE_SIZE - 3 * CHUNK - 77), image(DEVICE_SIZE - 3 * CHUNK - 77, 2)
    before = random.Random(1).randbytes(DEVICE_SIZE)
    with loop_device(tmp_path / "disk", DEVICE_SIZE, sector) as device:
        Path(device).write_bytes(before)
        base = publish(repository, data)
        result = restore(repository, base, device, RestoreOptions(in_place=in_place, verify=True))
        assert result.bytes_verified == len(data)
        assert Path(device).read_bytes() == data + before[len(data) :]
        with pytest.raises(StateError, match="not noted to hold a backup"):
            apply(repository, publish(repository, after), device)
        apply(repository, publish(repository, after), device, base=base, options=ApplyOptions(verify=True))
        assert Path(device).read_bytes() == after + before[len(data) :]
        assert not sidecar_of(Path(device)).exists()


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_an_unfinished_restore_does_not_go_on_on_another_disk_of_the_same_name(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = publish(repository, random.Random(5).randbytes(MIB))
    with loop_device(tmp_path / "one", MIB) as device:
        if blockdev_sequence(device) is None:
            pytest.skip("this kernel does not number disks (before Linux 5.15)")
        with stopping_after(monkeypatch, 3, OSError(errno.EIO, "broken")), pytest.raises(StorageError):
            restore(repository, manifest, device)
        subprocess.run(["losetup", "--detach", device], check=True)
        subprocess.run(["losetup", device, tmp_path / "one"], check=True)
        with pytest.raises(StateError, match="another file of this name"):
            restore(repository, manifest, device)
        restore(repository, manifest, device, RestoreOptions(overwrite=True, verify=True))


def blockdev_sequence(device: str) -> int | None:
    with open(device, "rb") as file:
        return blockdev.disk_sequence(file.fileno())


@pytest.mark.root
@pytest.mark.tool("losetup", "mkfs.ext4")
def test_targets_in_use_or_too_small_are_refused_by_name(repository: Repository, tmp_path: Path) -> None:
    manifest = publish(repository, image(MIB))
    anything = RestoreOptions(overwrite=True)
    with filesystem(tmp_path, DEVICE_SIZE) as (device, mounted):
        with pytest.raises(BusyError, match=f"{device} is in use by the mount on {mounted}"):
            restore(repository, manifest, device, anything)
        with pytest.raises(BusyError, match=f"{tmp_path / 'ext4'} is backing file of {device}"):
            restore(repository, manifest, tmp_path / "ext4", anything)
    with pytest.raises(BusyError, match="ext4 file system"):
        restore(repository, manifest, tmp_path / "ext4")
    with loop_device(tmp_path / "small", MIB // 2) as device, pytest.raises(StorageError, match="too small"):
        restore(repository, manifest, device, anything)


@pytest.mark.root
@pytest.mark.tool("losetup", "mkfs.ext4")
def test_a_full_file_system_stops_a_restore_that_goes_on_when_there_is_room(
    repository: Repository, tmp_path: Path
) -> None:
    data = random.Random(2).randbytes(6 * MIB)
    manifest = publish(repository, data)
    with filesystem(tmp_path, 10 * MIB) as (_, mounted):
        (mounted / "filler").write_bytes(bytes(3 * MIB))
        with pytest.raises(StorageError, match="No space left") as caught:
            restore(repository, manifest, mounted / "target", RestoreOptions(checkpoint_seconds=0))
        assert "make room" in caught.value.hint
        assert sidecar_of(mounted / "target").exists()
        (mounted / "filler").unlink()
        restore(repository, manifest, mounted / "target")
        assert (mounted / "target").read_bytes() == data


# ---- the command line


def summary(lines: str) -> dict[str, Any]:
    (found,) = (line for line in map(json.loads, lines.splitlines()) if line["message_type"] == "summary")
    return dict(found)


def test_the_commands_restore_apply_and_verify(commands: Stasis, repository: Repository, tmp_path: Path) -> None:
    data = bytearray(image(40 * CHUNK + 5))
    first, target = publish(repository, bytes(data)), tmp_path / "target"
    assert "restored " + first.id[:8] in commands("backup", "restore", first.id[:8], target, "--verify")
    data[0] ^= 1
    second = publish(repository, bytes(data), time="2026-01-03T00:00:00.000000Z")
    result = summary(commands("backup", "apply", "latest", target, "--sample", "100", "--json"))
    assert (result["message_type"], result["backup"], result["chunks_sampled"]) == ("summary", second.id, 41)
    assert target.read_bytes() == data
    assert "is sound" in commands("backup", "verify", "latest")
    assert "equal" in commands("backup", "verify", "latest", "--live", target)
    compared = commands.run("backup", "verify", first.id, "--live", target, "--json")
    assert compared.returncode == ExitCode.VERIFY
    assert summary(compared.stdout)["differing"] == [{"offset": 0, "length": 4096}]
    assert "holds data" in commands.fail(ExitCode.BUSY, "backup", "restore", first.id, target)
    commands("backup", "restore", first.id, "--output", target, "--in-place")
    assert target.read_bytes() == image(40 * CHUNK + 5)


def test_an_image_streams_to_standard_output(commands: Stasis, repository: Repository) -> None:
    data = image(50 * CHUNK + 3)
    publish(repository, data)
    for words in (["-"], ["--output", "-", "--json"]):
        command = [*commands.command, "backup", "restore", "latest", *words]
        result = subprocess.run(command, env=commands.environment, capture_output=True, check=True)
        assert result.stdout == data
        assert (b"summary" in result.stderr) == ("--json" in words)


def test_a_served_disk_is_compared_where_it_has_not_changed(
    commands: Stasis, repository: Repository, short_dir: Path, seed: int
) -> None:
    disk = Disk(commands, short_dir / "disk.img", 4 * MIB, seed)
    commands("backup", "create", "disk", "--storage", "memory")
    with Client.connect(disk.uri) as client:
        disk.write(client, MIB, b"seen" * 1024)
    live = ["backup", "verify", "latest", "--live", "disk", "--storage", "memory", "--json"]
    found = summary(commands(*live))
    assert (found["bytes_differing"], found["bytes_left_out"]) == (0, CHUNK)
    with disk.path.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(bytes(byte ^ 1 for byte in disk.expected[3 * MIB : 3 * MIB + 4096]))
    result = commands.run(*live)
    assert (result.returncode, summary(result.stdout)["differing"]) == (8, [{"offset": 3 * MIB, "length": 4096}])
    assert commands.json("snapshot", "list") == []
    assert commands.fail(ExitCode.BUSY, "backup", "restore", "latest", disk.path, "--overwrite")


def test_a_damaged_backup_has_its_exit_code_everywhere(
    commands: Stasis, repository: Repository, tmp_path: Path
) -> None:
    publish(repository, random.Random(3).randbytes(5 * CHUNK))
    spoiled = objects(repository, "chunks")[2]
    spoiled.unlink()
    for words in (["restore", "latest", tmp_path / "target"], ["verify", "latest"]):
        assert spoiled.name in commands.fail(ExitCode.DAMAGED, "backup", *words)
    assert sidecar_of(tmp_path / "target").exists()
    command = [*commands.command, "backup", "restore", "latest", "-"]
    streamed = subprocess.run(command, env=commands.environment, capture_output=True)
    assert (streamed.returncode, len(streamed.stdout) % CHUNK) == (ExitCode.DAMAGED, 0)
    assert spoiled.name in streamed.stderr.decode()


def test_a_reader_that_leaves_is_told_of(commands: Stasis, repository: Repository) -> None:
    publish(repository, image(50 * CHUNK))
    with commands.popen("backup", "restore", "latest", "-") as command:
        assert command.stdout is not None
        command.stdout.close()
        assert command.stderr is not None
        assert "before it was complete" in command.stderr.read()
    assert command.returncode == ExitCode.FAILURE


@pytest.mark.parametrize(
    "words", [[], ["a", "--output", "b"], ["-", "--in-place"], ["-", "--overwrite"], ["-", "--verify"]]
)
def test_targets_that_make_no_sense_are_refused(commands: Stasis, repository: Repository, words: list[str]) -> None:
    publish(repository, b"x")
    commands.fail(ExitCode.USAGE, "backup", "restore", "latest", *words)


def test_options_of_a_snapshot_need_one(commands: Stasis, repository: Repository) -> None:
    assert "--live" in commands.fail(ExitCode.USAGE, "backup", "verify", "latest", "--limit", "1G")


@contextmanager
def withheld(repository: Repository, manifest: Manifest, number: int) -> Iterator[Callable[[], bool]]:
    """Have whoever opens a chunk wait for the end of the block; the value tells whether somebody waits."""
    name = repository.index(manifest).name(number).hex()
    chunk = next(path for path in objects(repository, "chunks") if path.name == name)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel tells the holder of a lease
    with chunk.open("rb+") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("this file system has no leases")
        yield lambda: fcntl.fcntl(file, fcntl.F_GETLEASE) != fcntl.F_WRLCK
    signal.signal(signal.SIGIO, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_restore_that_goes_on(
    commands: Stasis, repository: Repository, tmp_path: Path, number: signal.Signals
) -> None:
    threads, batch = repository.parallelism, BATCH_BYTES // CHUNK
    data = random.Random(4).randbytes((threads + 4) * BATCH_BYTES)
    manifest, target = publish(repository, data), tmp_path / "target"
    with ExitStack() as stack:
        first = range(2 * batch, (2 + threads) * batch, batch)  # one for each thread to wait for
        waits = [stack.enter_context(withheld(repository, manifest, number)) for number in first]
        command = commands.popen("backup", "restore", "latest", target)
        while not all(somebody_waits() for somebody_waits in waits):
            assert command.poll() is None
            time.sleep(0.01)
        command.send_signal(number)
    assert command.communicate()[1] == "stasis: interrupted\n"
    assert command.returncode == ExitCode.INTERRUPTED
    # What was under way is finished, and with bad luck something more.
    assert (2 + threads) * BATCH_BYTES <= json.loads(sidecar_of(target).read_text())["position"] <= len(data)
    assert "continued at" in commands("backup", "restore", "latest", target)
    assert target.read_bytes() == data


def test_a_killed_restore_can_be_repeated(commands: Stasis, repository: Repository, tmp_path: Path) -> None:
    data = random.Random(6).randbytes(4 * BATCH_BYTES)
    manifest, target = publish(repository, data), tmp_path / "target"
    with withheld(repository, manifest, 3 * BATCH_BYTES // CHUNK) as somebody_waits:
        command = commands.popen("backup", "restore", "latest", target)
        while not somebody_waits():
            assert command.poll() is None
            time.sleep(0.01)
        command.kill()
    command.communicate()
    assert sidecar_of(target).exists()
    commands("backup", "restore", "latest", target)
    assert target.read_bytes() == data
    assert not sidecar_of(target).exists()
