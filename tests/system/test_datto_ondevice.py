# SPDX-License-Identifier: Apache-2.0
"""dattobd's way of working with the COW file on the protected file system itself: nothing is missed, and nobody's data
are harmed, whatever is done to the file. STASIS_LONG=1 makes it many rounds under fio."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from errno import EBUSY, EFBIG, EINVAL, EISDIR, ENOSPC, EOPNOTSUPP, ESTALE
from pathlib import Path

import pytest

from tests.daemon.helpers import await_true, kill
from tests.runner import Stasis
from tests.system.helpers import LONG, MIB, snapshot, tool
from tests.system.ondevice import Volume, blank_in, is_immutable, volume

pytestmark = [pytest.mark.root, pytest.mark.tool("nbdfuse", "losetup", "mkfs.ext4", "mkfs.xfs", "nbdcopy", "fio",
                                                 "e4defrag", "xfs_fsr")]

ROUNDS = 25 if LONG else 1


@pytest.fixture(autouse=True)
def _directories(stasis: Stasis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STASIS_RUN_DIR", str(stasis.run_dir))
    monkeypatch.setenv("STASIS_STATE_DIR", str(stasis.state_dir))


@pytest.fixture
def disk(stasis: Stasis, short_dir: Path, seed: int) -> Iterator[Volume]:
    with volume(stasis, short_dir, "ext4", seed) as disk:
        yield disk


def _fio(disk: Volume) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["fio", "--name=load", f"--directory={disk.mount}", "--size=4M", "--rw=randwrite", "--bs=4k",
         "--ioengine=psync",
         "--fsync=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"],
        stdout=subprocess.DEVNULL)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["ext4", "xfs", "small blocks"] if LONG else ["ext4", "xfs"])
def test_a_series_on_the_file_system_that_it_protects(stasis: Stasis, short_dir: Path, seed: int, kind: str) -> None:
    with volume(stasis, short_dir, kind, seed) as disk:
        copy, shot = short_dir / "copy", short_dir / "shot"
        disk.fill(10)
        disk.must("setup-snapshot", "-f", 20, disk.node, disk.mount / ".cow0", disk.minor)
        files = disk.files()
        disk.note_territory(disk.mount / ".cow0")
        first = disk.copy_image(copy)
        for number in range(ROUNDS):
            cow, following = disk.mount / f".cow{number}", disk.mount / f".cow{number + 1}"
            load = _fio(disk) if LONG else None
            disk.be_unpleasant(cow)
            disk.fill(8)
            assert load is None or load.wait() == 0
            assert disk.copy_image(shot) == first  # byte for byte, as often as it is read
            assert blank_in(first, cow)
            disk.check_copy(copy, files)
            disk.must("transition-to-incremental", disk.minor)
            assert is_immutable(cow)
            disk.be_unpleasant(cow)
            disk.fill(8)
            disk.unmount()
            disk.check_origin()
            await_true(lambda: disk.info()["state"] == 0)
            disk.mounted()
            disk.fill(4)
            await_true(lambda: disk.info()["state"] == 2)
            files = disk.files()
            disk.must("transition-to-snapshot", following, disk.minor)
            assert not is_immutable(cow)
            disk.note_territory(following)
            disk.update(cow, copy)
            first = disk.copy_image(shot)
            assert disk.same(copy.read_bytes(), first)
            disk.check_copy(copy, files)
            copy.write_bytes(first)
            disk.foreign.clear()
            disk.note_territory(following)
            cow.unlink()
        disk.must("destroy", disk.minor)
        assert not following.exists()


def test_the_file_s_own_writes_are_no_changes(disk: Volume) -> None:
    """dattobd counts the blocks of its own COW file: a tenth of the device without anybody having written."""
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    disk.must("transition-to-incremental", disk.minor)
    disk.must("transition-to-snapshot", disk.mount / ".cow1", disk.minor)
    listed = disk.stasis.json("datto", "changes", disk.mount / ".cow0")
    assert sum(extent["length"] for extent in listed) < MIB  # inodes, bitmaps and the journal
    size = (disk.mount / ".cow1").stat().st_size
    assert size > 6 * MIB
    disk.note_territory(disk.mount / ".cow1")
    own = disk.foreign
    assert not [extent for extent in listed for start, end in own
                if extent["offset"] < end and start < extent["offset"] + extent["length"]]
    disk.must("destroy", disk.minor)


def test_a_backup_of_its_image_is_right_to_the_last_byte(disk: Volume, short_dir: Path) -> None:
    """Also where COW files are and were: they list no changes of their own."""
    repo = short_dir / "repo"
    disk.stasis("repo", "init", repo, "--no-encryption")
    disk.fill(4)
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    disk.stasis("backup", "create", f"datto:{disk.minor}", "--repo", repo)
    disk.fill(4)
    disk.must("transition-to-incremental", disk.minor)
    disk.fill(4)
    disk.must("transition-to-snapshot", disk.mount / ".cow1", disk.minor)
    disk.stasis("backup", "create", f"datto:{disk.minor}", "--repo", repo)
    made = disk.stasis.json("backup", "list", "--repo", repo)
    assert [one["kind"] for one in made] == ["full", "incremental"]
    disk.stasis("backup", "restore", made[-1]["id"], short_dir / "restored", "--repo", repo)
    assert (short_dir / "restored").read_bytes() == disk.copy_image(short_dir / "image")
    disk.must("destroy", disk.minor)


def test_it_survives_its_daemon_and_a_new_attachment(disk: Volume, short_dir: Path) -> None:
    disk.fill(6)
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    first = disk.copy_image(short_dir / "a")
    disk.fill(4)
    pid = disk.stasis.daemon_pid()
    assert pid is not None
    kill(pid)
    disk.fill(4)
    assert disk.info()["state"] == 3
    assert disk.copy_image(short_dir / "b") == first
    disk.unmount()
    disk.detach()
    assert disk.info()["state"] == 1
    disk.must("destroy", disk.minor)
    disk.must("reload-snapshot", disk.image, "/.cow0", disk.minor)  # as seen from its mount point
    disk.attach()
    disk.mounted()
    assert is_immutable(disk.mount / ".cow0")
    disk.fill(4)
    await_true(lambda: disk.info()["state"] == 3 or disk.info()["error"] != 0)
    assert not disk.info()["error"], disk.info()
    assert disk.copy_image(short_dir / "b") == first
    disk.must("destroy", disk.minor)
    assert not (disk.mount / ".cow0").exists()


@pytest.mark.expects_errors("died; starting it again", "does not go on", "cannot be connected again")
def test_it_survives_the_death_of_its_worker(disk: Volume, short_dir: Path) -> None:
    """nbdfuse loses its server with the worker, so the file system has to be mounted again."""
    disk.fill(6)
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    first = disk.copy_image(short_dir / "a")
    disk.fill(6)
    pid = disk.stasis.json("device", "show", "disk")["pid"]
    kill(pid)
    await_true(lambda: disk.stasis.json("device", "show", "disk")["pid"] not in (None, pid))
    disk.unmount()
    disk.detach()
    disk.attach()
    disk.mounted()
    disk.fill(6)
    assert (disk.info()["state"], disk.info()["error"]) == (3, 0)
    assert disk.copy_image(short_dir / "b") == first
    disk.must("destroy", disk.minor)


MOMENTS = ["filled", "named", "recorded"]


def _is_at(disk: Volume, moment: str) -> bool:
    """How far the making of a COW file has come."""
    if moment == "recorded":
        return any((disk.stasis.state_dir / "devices" / "disk").glob("pinned-*"))
    wanted = ".cow0" if moment == "named" else ".new"
    return any(path.name.endswith(wanted) for path in disk.mount.iterdir())


@pytest.mark.parametrize("moment", MOMENTS if LONG else MOMENTS[:1])
def test_a_daemon_that_dies_while_it_is_made_leaves_nothing(disk: Volume, moment: str) -> None:
    setup = disk.stasis.popen("datto", "setup", "disk", disk.mount / ".cow0")
    await_true(lambda: _is_at(disk, moment))
    pid = disk.stasis.daemon_pid()
    assert pid is not None
    kill(pid)
    setup.communicate()
    known = disk.stasis.json("datto", "list")
    if known:
        assert known[0]["state"] == 3
        disk.must("destroy", disk.minor)
    await_true(lambda: not [path for path in disk.mount.iterdir() if "cow" in path.name])
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    disk.must("destroy", disk.minor)


@pytest.mark.expects_errors("died; starting it again", "does not go on", "cannot be connected again", "not removed")
@pytest.mark.parametrize("moment", MOMENTS if LONG else MOMENTS[1:2])
def test_a_worker_that_dies_while_it_is_made_leaves_nothing_in_the_way(disk: Volume, moment: str) -> None:
    """The file system loses its device, so nothing can be removed now."""
    setup = disk.stasis.popen("datto", "setup", "disk", disk.mount / ".cow0")
    await_true(lambda: _is_at(disk, moment))
    pid = _worker(disk)
    kill(pid)
    setup.communicate()
    await_true(lambda: disk.stasis.json("device", "show", "disk")["pid"] not in (None, pid))
    disk.unmount()
    disk.detach()
    disk.attach()
    disk.mounted()
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    assert [path.name for path in disk.mount.iterdir() if "cow" in path.name] == [".cow0"]
    disk.must("destroy", disk.minor)


def _worker(disk: Volume) -> int:
    """Its pid, without asking the daemon, which waits for it."""
    return int(json.loads((disk.stasis.run_dir / "workers" / "disk.json").read_text())["pid"])


def test_a_snapshot_that_is_held_keeps_what_was_where_the_file_is_now(disk: Volume, storage: Path, short_dir: Path
                                                                     ) -> None:
    disk.fill(12)
    with snapshot(disk.stasis, storage, "disk") as taken:
        image = taken["devices"][0]["uri"]
        tool("nbdcopy", image, short_dir / "before")
        for path in disk.mount.glob("f*"):
            path.unlink()
        tool("sync", "-f", disk.mount)
        disk.must("setup-snapshot", "-f", "20", disk.node, disk.mount / ".cow0", disk.minor)
        disk.fill(12)
        tool("nbdcopy", image, short_dir / "after")
        tool("cmp", short_dir / "before", short_dir / "after")
    disk.must("destroy", disk.minor)


def test_a_full_file_fails_the_tracer_and_goes(disk: Volume) -> None:
    disk.must("setup-snapshot", "-f", "1", disk.node, disk.mount / ".cow0", disk.minor)
    disk.fill(30)
    files = disk.files()
    await_true(lambda: disk.info()["error"] == -EFBIG)
    await_true(lambda: not (disk.mount / ".cow0").exists())
    assert disk.files() == files
    disk.must("destroy", disk.minor)


def test_whoever_takes_the_blocks_away_keeps_them(disk: Volume) -> None:
    """The protection taken off and the file removed by root: who gets its blocks must find there what he wrote."""
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    tool("chattr", "-i", disk.mount / ".cow0")
    (disk.mount / ".cow0").unlink()
    written = {}
    for number in range(40):
        written[f"n{number}"] = os.urandom(MIB)
        (disk.mount / f"n{number}").write_bytes(written[f"n{number}"])
        tool("sync", "-f", disk.mount)
        if disk.info()["error"]:
            break
    assert disk.info()["error"] == -ESTALE
    disk.fill(4)
    disk.unmount()
    disk.mounted()
    assert {name: (disk.mount / name).read_bytes() for name in written} == written
    disk.must("destroy", disk.minor)


def test_protection_that_was_left_behind_is_taken_off(disk: Volume) -> None:
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", disk.minor)
    disk.unmount()
    await_true(lambda: disk.info()["state"] == 1)
    disk.must("destroy", disk.minor)
    disk.mounted()
    await_true(lambda: not is_immutable(disk.mount / ".cow0"))
    tool("chattr", "+i", disk.mount / ".cow0")  # as a crash leaves it
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow0", 1)
    disk.must("destroy", 1)


def test_refusals_say_what_is_wrong_and_change_nothing(disk: Volume, short_dir: Path) -> None:
    def refused(errno: int, *arguments: str | Path) -> str:
        before = sorted(disk.mount.iterdir())
        status, said = disk.dbdctl(*arguments)
        assert status == 255
        assert f"{os.strerror(errno)}\n" in said
        assert sorted(disk.mount.iterdir()) == before
        return said

    (disk.mount / "directory").mkdir()
    refused(EISDIR, "setup-snapshot", disk.node, disk.mount / "directory", disk.minor)
    refused(ENOSPC, "setup-snapshot", "-f", "500", disk.node, disk.mount / ".cow", disk.minor)
    disk.must("setup-snapshot", disk.node, disk.mount / ".cow", disk.minor)
    assert "grow" in refused(EOPNOTSUPP, "expand-cow-file", 1, disk.minor)
    assert "grow" in refused(EOPNOTSUPP, "reconfigure-auto-expand", 1, disk.minor)
    assert disk.info()["error"] == 0
    disk.must("transition-to-incremental", disk.minor)
    refused(EBUSY, "transition-to-snapshot", disk.mount / ".cow", disk.minor)
    refused(EINVAL, "transition-to-incremental", disk.minor)
    assert disk.info()["state"] == 2
    disk.must("transition-to-snapshot", short_dir / "elsewhere", disk.minor)
    disk.must("destroy", disk.minor)
