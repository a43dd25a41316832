# SPDX-License-Identifier: Apache-2.0
"""Points in time by snapshots of btrfs and LVM: what they hold, and that nothing is left of them in any case.

LVM is a stand-in here, for what it is asked and for what it answers; tests/vm/test_providers.py has the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stasis.errors import StasisError
from stasis.linux import btrfs
from stasis.live import keeper, subvolume, volume
from stasis.live.providers import PointSource, Reflink, open_file, probe_ways
from stasis.live.subvolume import Subvolume
from stasis.live.volume import LogicalVolume
from tests.live.disks import MIB, Disk, formatted, put_number, tool, writing
from tests.system.helpers import wait_until

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup")]

needs_btrfs = pytest.mark.tool("mkfs.btrfs", "btrfs", "chattr")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with formatted("btrfs", tmp_path) as made:
        yield made


@pytest.fixture
def image(disk: Disk) -> Path:
    """A file that cannot be cloned into one of the same directory: it is written in place."""
    tool("btrfs", "subvolume", "create", disk.directory / "sub")
    image = disk.directory / "sub" / "folder" / "image"
    image.parent.mkdir()
    image.touch()
    tool("chattr", "+C", image)
    image.write_bytes(bytes(2 * MIB))
    return image


def snapshots(disk: Disk) -> list[str]:
    return [path.name for path in (disk.directory / "sub").iterdir() if path.name != "folder"]


@needs_btrfs
def test_a_file_that_cannot_be_cloned_is_read_from_a_snapshot(disk: Disk, image: Path) -> None:
    """A number goes to the beginning, durably, then to the end: it is never ahead there."""
    assert Reflink().why_not(str(image))
    assert Subvolume().why_not(str(image)) == ""

    def write(number: int) -> None:
        put_number(image, number)
        fd = os.open(image, os.O_WRONLY | os.O_DSYNC)
        try:
            os.pwrite(fd, f"{number:09}".encode(), MIB)
        finally:
            os.close(fd)

    write(0)
    with writing(write):
        source = open_file("image", str(image))
        assert snapshots(disk) == []  # it is gone before it is read
        assert isinstance(source, PointSource)
        ends = bytearray(18)
        reader = source.open_reader()
        reader.read_into([(0, 9), (MIB, 9)], memoryview(ends))
        reader.read_into([(0, 9)], memoryview(ends)[9:])
        assert ends[:9] == ends[9:]  # whatever is written by now
        reader.read_into([(0, 9), (MIB, 9)], memoryview(ends))
        reader.close()
        source.close()
    assert int(ends[:9]) - int(ends[9:]) in (0, 1)
    assert (source.taken is not None, source.disturbed()) == (True, "")


MAKER = """
import os, signal, sys
from stasis.linux import btrfs
from stasis.live import keeper, subvolume
snapshot = btrfs.snapshot
made = []
class Seen(keeper.Keeper):
    def __init__(self, *words, **what):
        super().__init__(*words, **what)
        made.append(self)
def stop(top, name):
    snapshot(top, name)
    print(made[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
btrfs.snapshot, subvolume.Keeper = stop, Seen
subvolume.Subvolume().take(sys.argv[1])
"""


@contextlib.contextmanager
def stopped_maker(image: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """One that stops itself when it has made a snapshot; and the process id of its keeper."""
    with subprocess.Popen([sys.executable, "-c", MAKER, str(image)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            yield process, pid
        finally:
            process.kill()


@needs_btrfs
def test_a_maker_that_is_killed_leaves_no_snapshot(disk: Disk, image: Path) -> None:
    with stopped_maker(image) as (process, _):
        assert len(snapshots(disk)) == 1
        Subvolume().take(str(image)).close()
        assert len(snapshots(disk)) == 1  # that of one who lives is left alone
        process.kill()
        wait_until(lambda: snapshots(disk) == [], "the snapshot is removed")


@needs_btrfs
def test_what_both_left_is_cleared_away_by_the_next(disk: Disk, image: Path) -> None:
    with stopped_maker(image) as (process, pid):
        os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert len(snapshots(disk)) == 1
        Subvolume().take(str(image)).close()
        assert snapshots(disk) == []


@needs_btrfs
def test_a_keeper_that_is_killed_is_replaced_by_its_maker(disk: Disk, image: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[keeper.Keeper] = []

    class Killed(keeper.Keeper):
        def close(self) -> str:
            made.append(self)
            os.kill(self.pid, signal.SIGKILL)
            return super().close()

    monkeypatch.setattr(subvolume, "Keeper", Killed)
    Subvolume().take(str(image)).close()
    assert (len(made), snapshots(disk)) == (1, [])


@needs_btrfs
def test_a_snapshot_that_cannot_be_made_leaves_the_file_as_it_lies(disk: Disk, image: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(top: str, name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(btrfs, "snapshot", refuse)
    source = open_file("image", str(image))
    assert not isinstance(source, PointSource)
    source.close()
    assert Subvolume().why_not(str(image)) == "No space left on device"
    assert snapshots(disk) == []


def test_elsewhere_there_are_no_snapshots(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    found = {one.name: one for one in probe_ways(str(plain))}
    assert found["point in time by btrfs snapshot"].detail == "it lies on no btrfs"
    assert found["point in time by LVM snapshot"].detail == f"{plain} is not of its kind"


# -- LVM --------------------------------------------------------------------------------------------------------------

LVM = """#!{python}
import json, os, sys
home, words = {home!r}, sys.argv
name = os.path.basename(words[0])
with open(home + "/calls", "a") as calls:
    print(*[name, *words[1:]], file=calls)
state = json.load(open(home + "/state"))
rows = state["rows"]
if name == "lvs":
    wanted = words[-1].split("/")[-1]
    found = [row for row in rows if "--select" in words and state["tag"] in row["lv_tags"] and row["lv_name"] != "lv"]
    if "--select" not in words:
        found = [row for row in rows if wanted in ("vg", row["lv_name"], "vg-" + row["lv_name"])]
    print(json.dumps(dict(report=[dict(lv=found)])))
elif state["fails"].get(name):
    print("  WARNING: not this", "  " + state["fails"][name] + ".", sep="\\n", file=sys.stderr)
    sys.exit(5)
elif name == "lvcreate" and "--test" not in words:
    tags = [words[at + 1] for at, word in enumerate(words) if word == "--addtag"]
    rows.append(dict(rows[0], lv_name=words[words.index("--name") + 1], origin="lv", lv_tags=",".join(tags),
                     lv_dm_path=state["contents"]))
elif name == "lvremove":
    state["rows"] = [row for row in rows if "vg/" + row["lv_name"] != words[-1]]
json.dump(state, open(home + "/state", "w"))
"""
ROW = {"vg_name": "vg", "lv_name": "lv", "lv_size": "1000000", "vg_free": "2000000", "lv_layout": "linear",
       "pool_lv": "", "origin": "", "lv_tags": "", "lv_dm_path": "/dev/mapper/vg-lv", "lv_snapshot_invalid": ""}


class FakeLvm:
    """`lvs`, `lvcreate` and `lvremove` of a group with one volume."""

    def __init__(self, home: Path) -> None:
        self.home, self.device = home, home / "lv"
        self.device.write_bytes(b"now ")
        (home / "then").write_bytes(b"then")
        self.save({"rows": [ROW], "fails": {}, "tag": volume.TAG, "contents": str(home / "then")})
        for name in ("lvs", "lvcreate", "lvremove"):
            (home / name).write_text(LVM.format(python=sys.executable, home=str(home)))
            (home / name).chmod(0o755)

    def save(self, state: dict[str, Any]) -> None:
        (self.home / "state").write_text(json.dumps(state))

    @property
    def state(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.home / "state").read_text())
        return read

    def set(self, **fields: str) -> None:
        self.save({**self.state, "rows": [{**ROW, **fields}]})

    def fail(self, name: str, said: str) -> None:
        self.save({**self.state, "fails": {name: said}})

    @property
    def names(self) -> list[str]:
        return [row["lv_name"] for row in self.state["rows"]]

    def calls(self, name: str) -> list[list[str]]:
        lines = (self.home / "calls").read_text().splitlines()
        return [line.split()[1:] for line in lines if line.split()[0] == name]


@pytest.fixture
def lvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
    fake = FakeLvm(tmp_path)
    sysfs = tmp_path / "sysfs" / "dm"
    sysfs.mkdir(parents=True)
    (sysfs / "uuid").write_text("LVM-4Jz\n")
    (sysfs / "name").write_text("vg-lv\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("stasis.linux.blockdev.sysfs_path", lambda rdev: tmp_path / "sysfs")
    return fake


def test_a_volume_is_read_from_a_snapshot_that_goes_with_it(lvm: FakeLvm) -> None:
    point = LogicalVolume().take(str(lvm.device))
    assert os.pread(point.fd, 4, 0) == b"then"
    [words] = lvm.calls("lvcreate")
    assert ("--snapshot" in words, words[words.index("--extents") + 1], words[-1]) == (True, "100%ORIGIN", "vg/lv")
    assert len(lvm.names) == 2
    assert point.close() == ""
    assert lvm.names == ["lv"]


@pytest.mark.parametrize(("fields", "expected"), [({"vg_free": "5000"}, "--extents 100%FREE"),
                                                  ({"pool_lv": "pool", "vg_free": "0"}, "--setactivationskip n")])
def test_a_snapshot_takes_what_there_is(lvm: FakeLvm, fields: dict[str, str], expected: str) -> None:
    lvm.set(**fields)
    LogicalVolume().take(str(lvm.device)).close()
    assert expected in " ".join(lvm.calls("lvcreate")[0])


@pytest.mark.parametrize(("fields", "why"), [({"vg_free": "0"}, "vg has no free space"),
                                             ({"origin": "other"}, "it is a snapshot itself")])
def test_where_no_snapshot_can_be_made_it_is_said_why(lvm: FakeLvm, fields: dict[str, str], why: str) -> None:
    lvm.set(**fields)
    assert why in LogicalVolume().why_not(str(lvm.device))
    with pytest.raises(StasisError, match=why):
        LogicalVolume().take(str(lvm.device))


def test_what_lvm_says_is_handed_on(lvm: FakeLvm) -> None:
    assert LogicalVolume().why_not(str(lvm.device)) == ""
    assert "--test" in lvm.calls("lvcreate")[0]
    lvm.fail("lvcreate", "Snapshots of this are not supported")
    assert LogicalVolume().why_not(str(lvm.device)) == "Snapshots of this are not supported"
    with pytest.raises(StasisError, match=r"cannot make a snapshot of .*: Snapshots of this are not supported$"):
        LogicalVolume().take(str(lvm.device))
    assert lvm.names == ["lv"]


def test_without_lvm_it_is_said(lvm: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    assert LogicalVolume().why_not(str(lvm.device)) == "lvs is not installed"


def test_a_snapshot_that_cannot_be_removed_is_told(lvm: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "REMOVE_SECONDS", 0.0)
    lvm.fail("lvremove", "Logical volume vg/x in use")
    assert volume.undo("vg/lv") == "Logical volume vg/x in use"
    assert volume.undo("vg/nothing") == ""


def test_a_snapshot_that_ran_full_is_no_error_of_the_device(lvm: FakeLvm) -> None:
    """--on-read-error skip would store zeroes for all of it."""
    source = PointSource("lv", str(lvm.device), LogicalVolume().take(str(lvm.device)))
    reader = source.open_reader()
    state = lvm.state
    lvm.save({**state, "rows": [state["rows"][0], {**state["rows"][1], "lv_snapshot_invalid": "1"}]})
    with pytest.raises(StasisError, match=r"point in time of .* was lost: .*ran full"):
        reader.read_into([(0, 4096)], memoryview(bytearray(4096)))
    lvm.save(state)
    with pytest.raises(OSError, match="shorter than it was"):
        reader.read_into([(0, 4096)], memoryview(bytearray(4096)))
    reader.close()
    source.close()
    assert lvm.names == ["lv"]


def test_snapshots_of_the_dead_are_removed_and_of_the_living_are_not(lvm: FakeLvm) -> None:
    state, dead = lvm.state, "1-1-00000000"
    others = [{**ROW, "lv_name": f"old{number}", "origin": "lv", "lv_tags": f"{volume.TAG},{volume.TAG}-{owner}"}
              for number, owner in enumerate((dead, keeper.owner()))]
    lvm.save({**state, "rows": [ROW, *others]})
    LogicalVolume().take(str(lvm.device)).close()
    assert lvm.names == ["lv", "old1"]
