# SPDX-License-Identifier: Apache-2.0
"""dbdctl, update-img, `stasis datto` and the module stasis.datto as scripts use them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stasis import datto
from stasis.cli import dbdctl, update_img
from stasis.datto.cowreader import CowReader
from stasis.errors import ExitCode
from tests.daemon.helpers import read, write
from tests.runner import Stasis

SIZE = (4 << 20) + 512


class Tools:
    """The console scripts on the directories of a test, called in the test's own process."""

    def __init__(self, stasis: Stasis, directory: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("STASIS_RUN_DIR", str(stasis.run_dir))
        patch.setenv("STASIS_STATE_DIR", str(stasis.state_dir))
        patch.chdir(directory)
        self.stasis, self.directory = stasis, directory
        self.disk = directory / "disk"
        self.disk.write_bytes(bytes(range(256)) * (SIZE // 256))

    def run(self, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        main = {"dbdctl": dbdctl.main, "update_img": update_img.main}[module]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(module, status, out.getvalue(), err.getvalue())

    def dbdctl(self, *arguments: str | Path) -> None:
        """Must succeed, without a word."""
        result = self.run("dbdctl", *arguments)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def fails(self, number: int, *arguments: str | Path) -> str:
        """dbdctl must fail with this errno."""
        result = self.run("dbdctl", *arguments)
        expected = "driver returned an error performing specified action. check dmesg for more info: "
        assert result.returncode == 255
        assert result.stderr.startswith(f"{expected}{os.strerror(number)}\n"), result.stderr
        return result.stderr

    def update(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("update_img", *arguments)

    def write(self, offset: int, data: bytes) -> None:
        write(f"nbd+unix:///disk?socket={self.stasis.run_dir}/nbd/disk.sock", offset, data)

    def image(self) -> bytes:
        return read(f"nbd+unix:///datto0?socket={self.stasis.run_dir}/nbd/datto0.sock", 0, SIZE)


@pytest.fixture
def tools(stasis: Stasis, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(stasis, short_dir, monkeypatch)


@pytest.fixture
def attached(tools: Tools) -> Tools:
    tools.stasis("device", "attach", tools.disk)
    return tools


@pytest.fixture
def updatable(attached: Tools) -> Tools:
    """After a copy, some writes and the transition: `copy` is to be updated by `cow0`."""
    attached.dbdctl("setup-snapshot", attached.disk, "cow0", "0")
    (attached.directory / "copy").write_bytes(attached.image())
    attached.write(5000, b"x" * 9000)
    attached.dbdctl("transition-to-incremental", "0")
    attached.write(SIZE - 3, b"end")
    attached.dbdctl("transition-to-snapshot", "cow1", "0")
    return attached


@pytest.mark.parametrize(("module", "status", "said"), [
    ("dbdctl", 255, "usage: dbdctl <sub-command>"), ("update_img", 22, "usage: update-img <snapshot device>"),
])
def test_they_are_programs(tools: Tools, module: str, status: int, said: str) -> None:
    result = subprocess.run([sys.executable, "-m", f"stasis.cli.{module}"], env=tools.stasis.environment, text=True,
                            capture_output=True)
    assert (result.returncode, said in result.stdout + result.stderr) == (status, True)


# -- dbdctl ---------------------------------------------------------------------------------------------------


def test_without_a_daemon_the_driver_does_not_appear_to_be_loaded(tools: Tools) -> None:
    for arguments in (["help"], ["destroy", "0"]):
        result = tools.run("dbdctl", *arguments)
        assert result.returncode == 255
        assert result.stderr.startswith("driver does not appear to be loaded: Invalid argument\n")
    result = tools.run("dbdctl")
    assert (result.returncode, result.stderr) == (255, "")
    assert result.stdout.startswith("usage: dbdctl")


def test_usage_and_what_cannot_be_interpreted(attached: Tools) -> None:
    for arguments, status in ((["help"], 0), (["nonsense"], 255)):
        result = attached.run("dbdctl", *arguments)
        assert (result.returncode, result.stderr) == (status, "")
        assert result.stdout.startswith("usage: dbdctl")
    for arguments, said in (
        (["setup-snapshot", "a", "b"], "setup snapshot parameters: Invalid argument"),
        (["setup-snapshot", "-x", "a", "b", "0"], "setup snapshot parameters: Invalid argument"),
        (["destroy", "x"], "destroy parameters: Success"),
        (["destroy", "-1"], "destroy parameters: Success"),
        (["reload-snapshot", "a", "b", "0", "-c", "9223372036854775807"],
         "reload snapshot parameters: Numerical result out of range"),
        (["expand-cow-file", "1"], "expand parameters: Invalid argument"),
        (["transition-to-incremental", "0", "0"], "transition to incremental parameters: Invalid argument"),
        (["reconfigure-auto-expand", "x", "0"], "reconfigure auto expand parameters: Success"),
    ):
        result = attached.run("dbdctl", *arguments)
        assert result.returncode == 255
        assert f"error interpreting {said}\n" in result.stderr
        assert result.stdout.startswith("usage: dbdctl")


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("10", 10), ("010", 8), ("08", 0), ("0000", 0), ("4096", 4096)])
def test_numbers_are_read_as_the_tool_reads_them(text: str, value: int) -> None:
    assert dbdctl._number(text) == value


def test_every_errno_reaches_the_caller(attached: Tools) -> None:
    fails, disk = attached.fails, attached.disk
    fails(errno.ENOENT, "destroy", "0")
    fails(errno.EINVAL, "destroy", "24")
    fails(errno.ENOENT, "setup-snapshot", "none", "cow", "0")
    fails(errno.ENOTBLK, "setup-snapshot", __file__, "cow", "0")
    fails(errno.EISDIR, "setup-snapshot", disk, ".", "0")
    fails(errno.ENOENT, "setup-snapshot", disk, "none/cow", "0")
    fails(errno.EINVAL, "reload-incremental", disk, "cow", "0")
    attached.dbdctl("setup-snapshot", "-f", "8", "-c", "400", disk, "cow", "0")
    assert "in use for" in fails(errno.EBUSY, "setup-snapshot", disk, "cow2", "0")
    fails(errno.EINVAL, "setup-snapshot", disk, "cow2", "1")
    fails(errno.EINVAL, "transition-to-snapshot", "cow2", "0")
    attached.dbdctl("reconfigure", "0")
    attached.dbdctl("expand-cow-file", "1", "0")
    attached.dbdctl("reconfigure-auto-expand", "1", "0", "-r", "2")
    info = json.loads((attached.stasis.run_dir / "datto-info").read_text())["devices"][0]
    assert info["cow_size_current"] == (9 << 20)
    assert info["auto_expand"] == {"step_size_mib": 1, "reserved_space_mib": 2}
    fails(errno.EFBIG, "expand-cow-file", str(1 << 60), "0")
    attached.dbdctl("transition-to-incremental", "0")
    fails(errno.EINVAL, "expand-cow-file", "1", "0")
    attached.dbdctl("destroy", "0")
    assert not (attached.directory / "cow").exists()


def test_reload_before_the_device_is_served(attached: Tools) -> None:
    attached.dbdctl("setup-snapshot", attached.disk, "cow", "0")
    attached.stasis("device", "detach", "disk")
    attached.dbdctl("destroy", "0")
    attached.dbdctl("reload-snapshot", attached.disk, "cow", "5")
    attached.stasis("device", "attach", attached.disk)
    assert attached.stasis.json("datto", "show", "5")["state_name"] == "active snapshot"


# -- update-img -----------------------------------------------------------------------------------------------


def test_the_whole_way_of_working(updatable: Tools) -> None:
    result = updatable.update("/dev/datto0", "cow0", "copy")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ("snapshot is 1025 blocks large\ncopying blocks\n"
                             "copying complete: 4 blocks changed, 0 errors\n")
    assert (updatable.directory / "copy").read_bytes() == updatable.image() == updatable.disk.read_bytes()
    listed = updatable.stasis.json("datto", "changes", updatable.directory / "cow0")
    assert listed == [{"offset": 4096, "length": 12288}, {"offset": 4 << 20, "length": 512}]
    assert updatable.stasis("datto", "changes", updatable.directory / "cow0", "--size", str(SIZE)).split() == [
        "4096", "12288", str(4 << 20), "512"]


def test_update_img_refuses_what_does_not_belong_together(updatable: Tools, short_dir: Path) -> None:
    before = (short_dir / "copy").read_bytes()
    (short_dir / "short").write_bytes(bytes(SIZE - 1))
    (short_dir / "cut").write_bytes((short_dir / "cow0").read_bytes()[:5000])
    (short_dir / "odd").write_bytes(b"\0" * 40000)
    header = bytearray((short_dir / "cow0").read_bytes())
    header[0x20] ^= 1
    (short_dir / "other").write_bytes(header)
    for arguments, status, said in (
        (["/dev/datto0", "cow0"], 22, "usage: update-img"),
        (["/dev/sda", "cow0", "copy"], 22, "snapshot does not appear to be a dattobd snapshot device"),
        (["/dev/datto7", "cow0", "copy"], 2, "error reading dattobd info from driver"),
        (["/dev/datto0", "none", "copy"], 2, "error opening cow file"),
        (["/dev/datto0", "odd", "copy"], 22, "invalid magic number from cow file"),
        (["/dev/datto0", "cut", "copy"], 74, "error reading cow header"),
        (["/dev/datto0", "other", "copy"], 22, "cow file uuid does not match snapshot"),
        (["/dev/datto0", "cow1", "copy"], 22, "snapshot provided does not immediately follow"),
        (["/dev/datto0", "cow0", "none"], 2, "error opening image"),
        (["/dev/datto0", "cow0", "short"], 22, "error opening image"),
    ):
        result = updatable.update(*arguments)
        assert (result.returncode, result.stderr.startswith(said)) == (status, True), (arguments, result)
    assert (short_dir / "copy").read_bytes() == before
    assert not (short_dir / "none").exists()


# -- stasis datto -----------------------------------------------------------------------------------------------


def test_stasis_datto(attached: Tools) -> None:
    stasis, directory = attached.stasis, attached.directory
    (directory / "two").write_bytes(bytes(1 << 20))
    stasis("device", "attach", directory / "two")
    stasis.fail(ExitCode.USAGE, "datto", "setup", "disk", directory / "a", "two", directory / "b")
    stasis.fail(ExitCode.USAGE, "datto", "setup", "disk")
    stasis.fail(ExitCode.NOT_FOUND, "datto", "show", "0")
    assert stasis("datto", "setup", "--group", "disk", directory / "a", "two", directory / "b").split() == ["0", "1"]
    assert [tracer["device"] for tracer in stasis.json("datto", "list")] == ["disk", "two"]
    assert "active snapshot" in stasis("datto", "list")
    assert "series" in stasis("datto", "show", "1")
    assert stasis("datto", "info") == (stasis.run_dir / "datto-info").read_text().rstrip("\n")
    stasis.fail(ExitCode.USAGE, "datto", "changes", directory / "a")
    watcher = stasis.popen("datto", "watch", "--json")
    try:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["minor"] == 0
        assert json.loads(watcher.stdout.readline())["minor"] == 1
        attached.dbdctl("transition-to-incremental", "1")
        assert json.loads(watcher.stdout.readline())["state"] == 2
        attached.dbdctl("destroy", "1")
        assert json.loads(watcher.stdout.readline()) == {"minor": 1, "state": None}
    finally:
        watcher.kill()
        watcher.communicate()


# -- Python -------------------------------------------------------------------------------------------------------


def _errno(call: object, *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.errno or 0


def test_the_eleven_calls(attached: Tools) -> None:
    cow = attached.directory / "cow"
    assert datto.dattobd_get_free_minor() == 0
    datto.dattobd_setup_snapshot(0, attached.disk, cow, 2, 1 << 20)
    assert datto.dattobd_get_free_minor() == 1
    found = datto.dattobd_info(0)
    assert (found.state, found.error, found.seqid, found.falloc_size, found.cache_size) == (3, 0, 1, 2 << 20, 1 << 20)
    assert (found.bdev, found.cow, len(found.uuid)) == (str(attached.disk), str(cow), 16)
    datto.dattobd_reconfigure(0, 0)
    datto.dattobd_expand_cow_file(0, 1)
    datto.dattobd_reconfigure_auto_expand(0, 1, 0)
    datto.dattobd_transition_incremental(0)
    datto.dattobd_transition_snapshot(0, attached.directory / "cow1", 3)
    assert (datto.dattobd_info(0).seqid, datto.dattobd_info(0).falloc_size) == (2, 3 << 20)
    datto.dattobd_destroy(0)
    assert _errno(datto.dattobd_destroy, 0) == errno.ENOENT
    assert _errno(datto.dattobd_info, 24) == errno.EINVAL
    assert _errno(datto.dattobd_reload_snapshot, 0, attached.disk, cow) == errno.EINVAL
    assert _errno(datto.dattobd_reload_incremental, 0, "none", cow) == errno.ENOENT
    assert sorted(dir(datto))[1:] == sorted(name for name in dir(datto) if name.startswith("dattobd_"))
    with pytest.raises(AttributeError):
        datto.no_such_call  # noqa: B018
    with CowReader(str(cow), SIZE) as reader:
        assert list(reader.extents()) == []


@pytest.mark.usefixtures("tools")
def test_without_a_daemon_there_is_no_control_device() -> None:
    assert _errno(datto.dattobd_get_free_minor) == errno.ENOENT


# -- into a repository ------------------------------------------------------------------------------------------


def _backup(tools: Tools) -> dict[str, object]:
    printed = tools.stasis("backup", "create", "datto:0", "--repo", tools.directory / "repo", "--json")
    backups = json.loads(printed.splitlines()[-1])["backups"]
    return {name: backups[0][name] for name in ("id", "kind", "device")}


def test_a_tracer_is_backed_up_and_left_out_snapshots_cost_no_full_backup(attached: Tools) -> None:
    stasis, directory = attached.stasis, attached.directory
    stasis("repo", "init", directory / "repo", "--no-encryption")
    attached.dbdctl("setup-snapshot", attached.disk, "cow0", "0")
    first = _backup(attached)
    assert (first["kind"], first["device"]) == ("full", "disk")
    for number in (1, 2):
        attached.dbdctl("transition-to-incremental", "0")
        attached.write(100000 * number, b"changed" * 1000)
        attached.dbdctl("transition-to-snapshot", f"cow{number}", "0")
    second = _backup(attached)
    assert second["kind"] == "incremental"
    stasis("backup", "restore", str(second["id"]), directory / "restored", "--repo", directory / "repo")
    assert (directory / "restored").read_bytes() == attached.disk.read_bytes()
    attached.dbdctl("transition-to-incremental", "0")
    assert attached.update("/dev/datto0", "cow1", "repo").returncode == errno.EINVAL
    attached.write(300000, b"again")
    attached.dbdctl("transition-to-snapshot", "cow2b", "0")
    assert attached.update("/dev/datto0", "cow1", "repo").returncode == errno.EINVAL
    result = attached.update("/dev/datto0", "cow2", "repo")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("copying complete: 1 blocks changed, 0 errors\n")
    third = stasis.json("backup", "list", "--repo", directory / "repo")[-1]
    assert third["kind"] == "incremental"
    stasis("backup", "restore", third["id"], directory / "updated", "--repo", directory / "repo")
    assert (directory / "updated").read_bytes() == attached.image()
    attached.dbdctl("transition-to-incremental", "0")
    stasis.fail(ExitCode.STATE, "backup", "create", "datto:0", "--repo", directory / "repo")
    attached.dbdctl("transition-to-snapshot", "cow3", "0")
    (directory / "cow2b").unlink()
    assert _backup(attached)["kind"] == "full"
