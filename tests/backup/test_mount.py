# SPDX-License-Identifier: Apache-2.0
"""A backup mounted as a directory: its files are there, and nothing is left behind whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stasis.backup.mount import command
from stasis.backup.mount.record import Process, Record
from stasis.backup.repo import Repository, Secret, Secrets
from stasis.backup.serve.opening import Wanted
from stasis.block import frontend
from stasis.cli.main import main
from stasis.errors import BusyError, ExitCode, LockedError, UnsupportedError
from tests.backup.stored import backup_of
from tests.runner import Stasis

MIB = 1 << 20
FILES = {"first": b"1" * 100_000, "last": b"2" * 300_000}

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "debugfs")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Images of disks as a crash leaves them: the journal holds what the file system does not have yet."""
    directory = tmp_path_factory.mktemp("images")
    return {kind: crashed(directory, kind) for kind in ("ext4", "xfs")}


def crashed(directory: Path, kind: str) -> bytes:
    image, target = directory / kind, directory / f"{kind}.mnt"
    with image.open("wb") as file:
        file.truncate(64 * MIB if kind == "ext4" else 320 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", image, target], check=True)
    try:
        for name, data in FILES.items():
            (target / name).write_bytes(data)
            os.sync()
        return image.read_bytes()
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.fixture(scope="module")
def repository(images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The images as backups of devices of these names, and others that are no file systems."""
    url = str(tmp_path_factory.mktemp("mounted") / "repo")
    partition = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 64 * MIB // 512)
    table = bytes(446) + partition + bytes(48) + b"\x55\xaa"
    journal = first_journal_block(images["ext4"])
    with Repository.init(url, secret=None) as repository:
        for kind, image in images.items():
            backup_of(repository, image, device=kind)
        backup_of(repository, table.ljust(MIB, b"\0") + images["ext4"], device="disk")
        backup_of(repository, bytes(8 * MIB), device="empty")
        backup_of(repository, b"LUKS\xba\xbe\0\1".ljust(8 * MIB, b"\0"), device="luks")
        broken = images["ext4"][:journal] + bytes(4096) + images["ext4"][journal + 4096 :]
        backup_of(repository, broken, device="broken")
    return url


def first_journal_block(image: bytes) -> int:
    """Where the journal's superblock is, in bytes: its magic number says."""
    return image.index(b"\xc0\x3b\x39\x98\x00\x00\x00\x04")


@pytest.fixture
def target(short_dir: Path) -> Iterator[Path]:
    path = short_dir / "mnt"
    path.mkdir()
    yield path
    with contextlib.suppress(OSError):
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)


@pytest.fixture
def mount(stasis: Stasis, repository: str, target: Path) -> Callable[..., dict[str, str]]:
    def run(device: str, *arguments: str) -> dict[str, str]:
        shown: dict[str, str] = stasis.json(
            "backup", "mount", "latest", target, "--device", device, "--repo", repository, *arguments)
        return shown

    return run


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def record(stasis: Stasis) -> dict[str, dict[str, int]]:
    [path] = (stasis.run_dir / "mounts").glob("*/record.json")
    found: dict[str, dict[str, int]] = json.loads(path.read_text())
    return found


def is_clean(stasis: Stasis, target: Path) -> bool:
    """Whether nothing is left of a mount: the fixtures look for processes, mounts and loop devices."""
    return not os.path.ismount(target) and not list((stasis.run_dir / "mounts").iterdir())


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_crashed_file_system_is_mounted_with_its_journal_replayed(
    stasis: Stasis, mount: Callable[..., dict[str, str]], target: Path, kind: str
) -> None:
    shown = mount(kind)
    assert (shown["type"], shown["replayed"], shown["directory"]) == (kind, True, str(target))
    for name, data in FILES.items():
        assert (target / name).read_bytes() == data
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    stasis("backup", "umount", target)
    assert is_clean(stasis, target)


def test_journal_that_cannot_be_replayed_is_left_out_and_that_is_said(
    stasis: Stasis, repository: str, target: Path
) -> None:
    result = stasis.run("backup", "mount", "latest", target, "--device", "broken", "--repo", repository)
    assert result.returncode == 0, result.stderr
    assert "noload" in result.stdout
    assert "could not be replayed" in result.stderr
    assert (target / "first").read_bytes() == FILES["first"]
    stasis("backup", "umount", target)


def test_partition_is_mounted_and_without_a_number_they_are_listed(
    stasis: Stasis, mount: Callable[..., dict[str, str]], repository: str, target: Path
) -> None:
    arguments = ["backup", "mount", "latest", target, "--device", "disk", "--repo", repository]
    said = stasis.fail(ExitCode.USAGE, *arguments)
    assert "partition table" in said
    assert "--partition N: 1 (ext4, 64 MiB)" in said
    assert "no partition 2" in stasis.fail(ExitCode.NOT_FOUND, *arguments, "--partition", "2")
    assert is_clean(stasis, target)
    assert mount("disk", "--partition", "1")["node"].endswith("p1")
    assert (target / "first").read_bytes() == FILES["first"]
    stasis("backup", "umount", target)
    assert is_clean(stasis, target)


def test_nothing_of_the_caller_is_held_by_a_mount(stasis: Stasis, repository: str, target: Path) -> None:
    """Neither a pipe that it left open by mistake, nor its working directory."""
    reader, writer = os.pipe()
    arguments = ["backup", "mount", "latest", target, "--device", "ext4", "--repo", repository]
    with stasis.popen(*arguments, pass_fds=[writer], cwd=target.parent) as process:
        os.close(writer)
        process.communicate(timeout=60)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b""
    for name in ("guardian", "server"):
        assert os.readlink(f"/proc/{record(stasis)[name]['pid']}/cwd") == "/"
    stasis("backup", "umount", target)


def test_passphrase_is_asked_for_on_the_terminal(
    stasis: Stasis, images: dict[str, bytes], target: Path, tmp_path: Path
) -> None:
    with Repository.init(str(tmp_path / "r"), secret=Secret(b"right")) as opened:
        backup = backup_of(opened, images["ext4"])
    terminal, ours = pty.openpty()
    arguments = ["backup", "mount", backup.id, target, "--repo", tmp_path / "r"]
    # In a session of its own it does not find the terminal that the tests were started from.
    own = {"stdin": ours, "stderr": ours, "start_new_session": True}
    with stasis.popen(*arguments, **own) as process, open(terminal, "wb+", buffering=0) as keyboard:
        os.close(ours)
        assert b"Passphrase" in keyboard.read(100)
        keyboard.write(b"right\n")
        assert process.wait(60) == 0
    assert (target / "first").read_bytes() == FILES["first"]
    stasis("backup", "umount", target)


def test_repository_that_can_only_be_read_will_do(
    stasis: Stasis, repository: str, target: Path, short_dir: Path
) -> None:
    copy = short_dir / "r"
    copy.mkdir()
    subprocess.run(["mount", "--bind", repository, copy], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", copy], check=True)
    try:
        stasis("backup", "mount", "latest", target, "--device", "ext4", "--repo", copy)
        assert (target / "first").read_bytes() == FILES["first"]
        stasis("backup", "umount", target)
    finally:
        subprocess.run(["umount", copy], check=True)


def test_plain_umount_gives_everything_back(
    stasis: Stasis, mount: Callable[..., dict[str, str]], repository: str, target: Path
) -> None:
    mount("ext4")
    with Repository.open(repository, Secrets.none()) as opened:
        with pytest.raises(LockedError, match="serve"), opened.lock_exclusive("prune"):
            pass
        subprocess.run(["umount", target], check=True)
        assert eventually(lambda: is_clean(stasis, target))
        assert eventually(lambda: not opened.locks())


def unmount(stasis: Stasis, target: Path) -> None:
    """Mount namespaces of tests that run beside this one may hold the device for a while."""

    def succeeds() -> bool:
        with stasis.popen("backup", "umount", target) as command:
            return command.wait() == 0

    assert eventually(succeeds)


class TestKilled:
    @pytest.mark.parametrize("victim", ["guardian", "server"])
    def test_either_process(
        self, stasis: Stasis, mount: Callable[..., dict[str, str]], repository: str, target: Path, victim: str
    ) -> None:
        mount("ext4")
        os.kill(record(stasis)[victim]["pid"], signal.SIGKILL)
        assert eventually(lambda: is_clean(stasis, target))
        with Repository.open(repository, Secrets.none()) as opened:
            assert eventually(lambda: victim == "server" or not opened.locks())
            opened.unlock(stale_only=False)

    def test_both_at_once_leaves_it_to_umount(
        self, stasis: Stasis, mount: Callable[..., dict[str, str]], repository: str, target: Path
    ) -> None:
        mount("ext4")
        processes = [Process(**record(stasis)[name]) for name in ("guardian", "server")]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for one in processes:
                os.kill(one.pid, number)
        assert eventually(lambda: not any(one.runs() for one in processes))
        unmount(stasis, target)
        assert is_clean(stasis, target)
        with Repository.open(repository, Secrets.none()) as opened:
            opened.unlock(stale_only=False)

    @pytest.mark.parametrize("when", ["record.json", "nbd.sock", "node/fuse/disk"])
    def test_command_that_mounts(self, stasis: Stasis, repository: str, target: Path, when: str) -> None:
        arguments = ["backup", "mount", "latest", target, "--device", "ext4", "--repo", repository]
        with stasis.popen(*arguments) as starting:
            mounts = stasis.run_dir / "mounts"
            assert eventually(lambda: bool(list(mounts.glob(f"*/{when}"))) or starting.poll() is not None)
            starting.kill()
            said, _ = starting.communicate()
        if said:  # it was faster and had done its work
            unmount(stasis, target)
        assert eventually(lambda: is_clean(stasis, target))

    def test_server_under_a_program_that_uses_it(
        self, stasis: Stasis, mount: Callable[..., dict[str, str]], repository: str, target: Path
    ) -> None:
        mount("ext4")
        with (target / "first").open("rb") as file:
            assert "in use" in stasis.fail(ExitCode.BUSY, "backup", "umount", target)
            assert file.read(10) == b"1" * 10
            os.kill(record(stasis)["server"]["pid"], signal.SIGKILL)
            assert eventually(lambda: not os.path.ismount(target))
        assert eventually(lambda: is_clean(stasis, target))
        with Repository.open(repository, Secrets.none()) as opened:
            opened.unlock(stale_only=False)

    def test_guardian_that_is_asked_to_end(
        self, stasis: Stasis, mount: Callable[..., dict[str, str]], target: Path
    ) -> None:
        mount("ext4")
        os.kill(record(stasis)["guardian"]["pid"], signal.SIGTERM)
        assert eventually(lambda: is_clean(stasis, target))


class TestRefusals:
    def test_directory(
        self, repository: str, tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        for directory, code, text in (
            (tmp_path / "none", ExitCode.NOT_FOUND, "does not exist"),
            (tmp_path / "file", ExitCode.USAGE, "is no directory"),
            (tmp_path, ExitCode.USAGE, "is not empty"),
            ("/dev/shm", ExitCode.BUSY, "mounted on /dev/shm already"),
        ):
            own = ["--run-dir", str(run_dir), "--state-dir", str(run_dir)]
            assert main(["backup", "mount", "latest", str(directory), "--repo", repository, *own]) == code
            assert text in capsys.readouterr().err

    def test_what_holds_no_file_system(self, stasis: Stasis, repository: str, target: Path) -> None:
        for device, text in (("empty", "no file system"), ("luks", "encrypted (LUKS)")):
            arguments = ["backup", "mount", "latest", target, "--device", device, "--repo", repository]
            assert text in stasis.fail(ExitCode.UNSUPPORTED, *arguments)
        assert is_clean(stasis, target)

    def test_errors_of_the_repository_come_through(self, stasis: Stasis, target: Path, tmp_path: Path) -> None:
        Repository.init(str(tmp_path / "r"), secret=Secret(b"right")).close()
        arguments = ["backup", "mount", "latest", target, "--repo"]
        assert "no repository" in stasis.fail(ExitCode.REPOSITORY, *arguments, tmp_path)
        stasis.environment["STASIS_PASSPHRASE"] = "wrong"
        stasis.fail(ExitCode.PASSPHRASE, *arguments, tmp_path / "r")
        stasis.environment["STASIS_PASSPHRASE"] = "right"
        stasis.fail(ExitCode.NOT_FOUND, *arguments, tmp_path / "r")
        assert is_clean(stasis, target)

    def test_directory_of_a_command_that_is_at_it(self, target: Path, run_dir: Path) -> None:
        record = Record.of(run_dir, str(target)).create()
        with pytest.raises(OSError, match="not empty"):
            Record.of(run_dir, str(target)).create()
        assert [path.name for path in (run_dir / "mounts").iterdir()] == [record.path.name]
        with pytest.raises(BusyError, match="being mounted"):
            command.make_record(run_dir, str(target))
        (record.path / "record.json").unlink()  # as one that was killed while it removed its directory leaves it
        (record.path / "mount.log").touch()
        assert command.make_record(run_dir, str(target)).guardian is not None
        record.remove()

    def test_umount_of_what_is_no_backup(
        self, run_dir: Path, target: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["backup", "umount", str(target), "--run-dir", str(run_dir)]) == ExitCode.NOT_FOUND
        assert "no backup is mounted" in capsys.readouterr().err

    def test_host_without_a_way(self, target: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unopened() -> Repository:
            raise AssertionError("there is no need to open it")

        monkeypatch.setattr(frontend, "probe", list)
        with pytest.raises(UnsupportedError, match="no way") as caught:
            command.mount(str(target), Wanted(["latest"]), unopened, run_dir=run_dir)
        assert "nbdfuse" in caught.value.hint
