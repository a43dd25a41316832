# SPDX-License-Identifier: Apache-2.0
"""`stasis backup send` and `receive` at the ends of a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from stasis.backup.repo import Manifest, Repository, Secrets
from stasis.errors import ExitCode
from tests.backup.stored import CHUNK, backup_of, content_of
from tests.runner import Stasis

DATA = os.urandom(CHUNK) + bytes(4 * CHUNK) + b"end"


@pytest.fixture
def backup(short_dir: Path) -> Manifest:
    Repository.init(str(short_dir / "b"), secret=None, chunk_size=CHUNK).close()
    with Repository.init(str(short_dir / "a"), secret=None, chunk_size=CHUNK) as repository:
        return backup_of(repository, DATA)


def piped(stasis: Stasis, sender: list[str], receiver: list[str]) -> tuple[int, int, str, str]:
    """Exit codes of both, and what the receiver and the sender said."""
    pipe = subprocess.PIPE
    with stasis.popen("backup", "send", *sender) as first:
        second = subprocess.run([*stasis.command, "backup", "receive", *receiver], env=stasis.environment,
                                stdin=first.stdout, stdout=pipe, stderr=pipe, text=True, timeout=120)
        assert first.stdout is not None
        assert first.stderr is not None
        first.stdout.close()
        said = first.stderr.read()
    assert "Traceback" not in second.stderr + said
    return first.returncode, second.returncode, second.stdout + second.stderr, said


def test_a_pipe_carries_a_backup_with_json_lines_on_both_sides(stasis: Stasis, short_dir: Path,
                                                               backup: Manifest) -> None:
    sent, received, out, said = piped(stasis, ["latest", "--repo", f"{short_dir}/a", "--json"],
                                      ["--repo", f"{short_dir}/b", "--json"])
    assert (sent, received) == (0, 0)
    summary = json.loads(out.splitlines()[-1])
    assert (summary["message_type"], summary["sent_as"], summary["known"]) == ("summary", backup.id, False)
    assert json.loads(said.splitlines()[-1])["bytes_data"] == CHUNK + 3
    with Repository.open(f"{short_dir}/b", Secrets.none()) as repository:
        assert content_of(repository, repository.resolve(summary["id"])) == DATA


def test_latest_is_that_of_the_device_that_is_named(stasis: Stasis, short_dir: Path, backup: Manifest) -> None:
    other = bytes(reversed(DATA))
    with Repository.open(f"{short_dir}/a", Secrets.none()) as repository:
        backup_of(repository, other, device="other")
    for device, content in (("disk", DATA), ("other", other)):
        sender = ["latest", "--device", device, "--repo", f"{short_dir}/a"]
        assert piped(stasis, sender, ["--output", f"{short_dir}/{device}.img"])[:2] == (0, 0)
        stasis("backup", "restore", *sender, f"{short_dir}/{device}-restored.img")
        stasis("backup", "restore", f"{sender[0]}", f"{short_dir}/{device}-before.img", *sender[1:])
        for name in (device, f"{device}-restored", f"{device}-before"):
            assert (short_dir / f"{name}.img").read_bytes() == content


def test_two_targets_are_too_many(stasis: Stasis, short_dir: Path, backup: Manifest) -> None:
    result = stasis.run("backup", "restore", "latest", f"{short_dir}/x.img", "--repo", f"{short_dir}/a",
                        f"{short_dir}/y.img")
    assert (result.returncode, "y.img" in result.stderr) == (ExitCode.USAGE, True)
    assert not (short_dir / "x.img").exists()


def test_a_stream_of_what_changed_finds_its_base_by_the_id_of_the_sender(stasis: Stasis, short_dir: Path,
                                                                         backup: Manifest) -> None:
    changed = DATA[:-3] + b"END"
    with Repository.open(f"{short_dir}/a", Secrets.none()) as repository:
        later = backup_of(repository, changed)
    ours = ["--repo", f"{short_dir}/a"]
    increment = [later.id[:10], "--from", backup.id[:10], *ours]
    assert piped(stasis, increment, ["--repo", f"{short_dir}/b"])[1] == ExitCode.NOT_FOUND
    assert piped(stasis, [backup.id, *ours], ["--repo", f"{short_dir}/b"])[:2] == (0, 0)
    code, _, out, _ = piped(stasis, increment, ["--repo", f"{short_dir}/b"])
    assert code == 0
    assert "incremental backup of disk on host: 3 bytes received" in out


def test_a_receiver_that_ends_early_is_an_error_of_the_sender(stasis: Stasis, short_dir: Path) -> None:
    with Repository.init(f"{short_dir}/big", secret=None, chunk_size=CHUNK) as repository:
        backup_of(repository, os.urandom(16 * CHUNK))
    sent, received, out, said = piped(stasis, ["latest", "--repo", f"{short_dir}/big"],
                                      ["--repo", f"{short_dir}/none"])
    assert (sent, received) == (ExitCode.FAILURE, ExitCode.REPOSITORY)
    assert "whoever read the stream ended before it was complete" in said
    assert "there is no repository in" in out


def test_a_terminal_is_neither_written_nor_read(stasis: Stasis, short_dir: Path, backup: Manifest) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [*stasis.command, "backup", "send", "latest", "--repo", f"{short_dir}/a"]
        result = subprocess.run(command, env=stasis.environment, stdout=theirs, stderr=subprocess.PIPE, text=True)
        assert (result.returncode, "nothing for a terminal" in result.stderr) == (ExitCode.USAGE, True)
        command = [*stasis.command, "backup", "receive", "--repo", f"{short_dir}/b"]
        result = subprocess.run(command, env=stasis.environment, stdin=theirs, stderr=subprocess.PIPE, text=True)
        assert (result.returncode, "not come from a terminal" in result.stderr) == (ExitCode.USAGE, True)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_full_disk_is_an_error_of_the_sender(stasis: Stasis, short_dir: Path, backup: Manifest) -> None:
    command = [*stasis.command, "backup", "send", "latest", "--repo", f"{short_dir}/a"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, env=stasis.environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == ExitCode.STORAGE
    assert "the stream cannot be written: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_receiver_that_is_killed_leaves_no_backup_and_the_next_one_works(stasis: Stasis, short_dir: Path,
                                                                          backup: Manifest) -> None:
    command = [*stasis.command, "backup", "send", backup.id, "--repo", f"{short_dir}/a"]
    stream = subprocess.run(command, env=stasis.environment, stdout=subprocess.PIPE, check=True).stdout
    for cut in (0, len(stream) // 2, len(stream) - 1):
        with stasis.popen("backup", "receive", "--repo", f"{short_dir}/b", stdin=subprocess.PIPE) as killed:
            assert killed.stdin is not None
            os.write(killed.stdin.fileno(), stream[:cut])
            killed.kill()
    with Repository.open(f"{short_dir}/b", Secrets.none()) as repository:
        assert repository.backups() == []
    assert piped(stasis, [backup.id, "--repo", f"{short_dir}/a"], ["--repo", f"{short_dir}/b"])[:2] == (0, 0)


def test_a_receiver_that_is_terminated_gives_its_lock_back(stasis: Stasis, short_dir: Path) -> None:
    """It has read more than the first megabyte when it is told to end, so it holds its lock."""
    with Repository.init(f"{short_dir}/r", secret=None, chunk_size=CHUNK) as repository:
        backup_of(repository, os.urandom(40 * CHUNK))
    command = [*stasis.command, "backup", "send", "latest", "--repo", f"{short_dir}/r"]
    stream = subprocess.run(command, env=stasis.environment, stdout=subprocess.PIPE, check=True).stdout
    with Repository.init(f"{short_dir}/t", secret=None) as target:
        with stasis.popen("backup", "receive", "--repo", target.url, stdin=subprocess.PIPE) as receiver:
            assert receiver.stdin is not None
            os.write(receiver.stdin.fileno(), stream[: 24 * CHUNK])
            receiver.terminate()
            _, said = receiver.communicate(timeout=60)
        assert (receiver.returncode, said) == (ExitCode.INTERRUPTED, "stasis: interrupted\n")
        assert target.locks() == []
        assert target.backups() == []


def test_an_image_is_received_without_a_repository(stasis: Stasis, short_dir: Path, backup: Manifest) -> None:
    assert piped(stasis, ["latest", "--repo", f"{short_dir}/a"], ["--output", f"{short_dir}/disk.img"])[:2] == (0, 0)
    assert (short_dir / "disk.img").read_bytes() == DATA


@pytest.mark.tool("qemu-io")
def test_a_backup_that_was_carried_over_is_the_base_of_the_next_one(stasis: Stasis, short_dir: Path) -> None:
    """The first full backup may travel on a disk; what changed since goes into the far repository itself."""
    for name in ("near", "far"):
        stasis("repo", "init", f"{short_dir}/{name}", "--no-encryption")
    (short_dir / "disk.img").write_bytes(os.urandom(4 << 20))
    uri = stasis.json("device", "attach", short_dir / "disk.img", "--name", "disk")["uri"]
    stasis("backup", "create", "disk", "--repo", f"{short_dir}/near")
    assert piped(stasis, ["latest", "--repo", f"{short_dir}/near"], ["--repo", f"{short_dir}/far"])[:2] == (0, 0)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 1M 64K", uri], check=True, capture_output=True)
    said = stasis("backup", "create", "disk", "--repo", f"{short_dir}/far")
    assert "disk: incremental since" in said
    assert "64 KiB changed of 4 MiB" in said
    assert "equal" in stasis("backup", "verify", "latest", "--live", "disk", "--repo", f"{short_dir}/far")
