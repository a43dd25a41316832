# SPDX-License-Identifier: Apache-2.0
"""Incremental backups, one after the other, of a mounted ext4 in which fio keeps writing: each is its snapshot's image.

The oldest ones are forgotten and pruned on the way, as a schedule does. STASIS_LONG=1 makes it ten times the rounds.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import stasis as api
from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.helpers import LONG, MIB, tool, wait_until
from tests.unmounting import unmount

SIZE = 64 * MIB
ROUNDS = 40 if LONG else 4
KEPT = 2
"""So many backups stay; older ones are forgotten in each round, after they were restored once."""

pytestmark = [pytest.mark.root, pytest.mark.tool("fio", "losetup", "mkfs.ext4", "e2fsck")]


@contextmanager
def _busy_disk(stasis: Stasis, directory: Path) -> Iterator[None]:
    """A served disk with a mounted ext4 that fio writes to, in place, appending and with fsync."""
    image, mounted = directory / "disk.img", directory / "mnt"
    with image.open("wb") as file:
        file.truncate(SIZE)
    mounted.mkdir()
    node = stasis.json("device", "attach", image, "--name", "disk", "--kernel")["node"]
    try:
        tool("mkfs.ext4", "-q", "-F", node)
        tool("mount", node, mounted)
        try:
            with _fio(mounted):
                yield
        finally:
            unmount(mounted)
    finally:
        stasis("device", "detach", "disk")


@contextmanager
def _fio(mounted: Path) -> Iterator[None]:
    command = ["fio", "--name=job", f"--directory={mounted}", "--rw=randwrite", "--size=2m", "--nrfiles=8",
               "--bssplit=4k/70:64k/30", "--ioengine=psync", "--fsync=4", "--fallocate=none", "--overwrite=0",
               "--create_on_open=1", "--unlink_each_loop=1", "--loops=1000000", "--time_based", "--runtime=3600",
               "--rate=4m"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as writer:
        try:
            wait_until(lambda: any(mounted.glob("job*")) or writer.poll() is not None, "a file of fio")
            yield
            assert writer.poll() is None, f"fio ended: {writer.communicate()}"
        finally:
            writer.terminate()


@dataclass
class Rounds:
    """The backups of one disk, and the digests of the images at their snapshots."""

    stasis: Stasis
    path: Path
    digests: dict[str, str]

    def back_up(self) -> str:
        """One round, once there is something new to back up; the kind of the backup."""
        with api.connect(self.stasis.run_dir, self.stasis.state_dir) as client:
            written = client.map_info("disk").change_number
            wait_until(lambda: bool(client.changed_extents("disk", written)), "a write")
            taken = client.create_snapshot(self.path / "storage", ["disk"], limit=2 * SIZE, take=True)
            try:
                self.stasis("backup", "create", f"{taken.id}:disk", "--self-check", "5")
                digest = _digest_of_image(taken.device("disk").uri)
            finally:
                client.destroy(taken.id)
        backup = self.stasis.json("backup", "show", "latest")
        assert backup["id"] not in self.digests
        self.digests[backup["id"]] = digest
        return str(backup["kind"])

    def restore_all(self) -> None:
        """Each backup that is kept is what its snapshot was, and a sound ext4."""
        for id_, digest in self.digests.items():
            restored = self.path / "restored.img"
            self.stasis("backup", "restore", id_, restored, "--overwrite")
            with restored.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest, id_
            tool("e2fsck", "-p", restored, status=(0, 1))  # replays the journal, and refuses what a crash cannot do
            tool("e2fsck", "-fn", restored)
            restored.unlink()

    def forget_old(self) -> None:
        self.stasis("backup", "forget", "--keep-last", str(KEPT), "--prune")
        kept = [backup["id"] for backup in self.stasis.json("backup", "list")]
        assert kept == list(self.digests)[-KEPT:]
        self.digests = {id_: self.digests[id_] for id_ in kept}


def _digest_of_image(uri: str) -> str:
    found = hashlib.sha256()
    with Client.connect(uri) as client:
        for offset in range(0, SIZE, MIB):
            found.update(client.pread(offset, MIB))
    return found.hexdigest()


def test_rounds_of_increments_while_fio_writes_into_ext4(stasis: Stasis, short_dir: Path) -> None:
    (short_dir / "storage").mkdir()
    stasis.environment |= {"STASIS_REPO": str(short_dir / "repo"), "STASIS_PASSPHRASE": "correct horse"}
    stasis("repo", "init", short_dir / "repo", "--chunk-size", "64K")
    rounds, kinds = Rounds(stasis, short_dir, {}), []
    with _busy_disk(stasis, short_dir):
        for _ in range(ROUNDS):
            kinds.append(rounds.back_up())
            rounds.restore_all()
            rounds.forget_old()
    assert kinds == ["full", *["incremental"] * (ROUNDS - 1)]
    stasis("repo", "check", "--read-data")
