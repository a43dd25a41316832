# SPDX-License-Identifier: Apache-2.0
"""Wrong input gets one sentence, a hint, the documented exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.cli.main import build_parser
from stasis.errors import ExitCode, UsageError
from tests.runner import Stasis

MIB = 1 << 20


@pytest.fixture
def image(short_dir: Path) -> Path:
    path = short_dir / "disk.img"
    path.write_bytes(os.urandom(2 * MIB))
    return path


@pytest.fixture
def storage(short_dir: Path) -> Path:
    path = short_dir / "storage"
    path.mkdir()
    return path


def _sentence(error: str) -> str:
    """The one sentence, from output that holds it, perhaps a hint, and perhaps that a daemon was started."""
    lines = [line for line in error.splitlines() if "started the daemon" not in line]
    assert lines, "nothing was said"
    assert lines[0].startswith("stasis: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), error
    return error


def _nothing_left(stasis: Stasis, *, devices: int = 0) -> None:
    assert len(stasis.json("device", "list")) == devices
    assert stasis.json("snapshot", "list") == []
    assert list((stasis.run_dir / "snapshots").iterdir()) == []
    assert len(list((stasis.state_dir / "devices").iterdir())) == devices
    assert len(list((stasis.run_dir / "nbd").iterdir())) == devices


def test_a_path_that_does_not_exist(stasis: Stasis, short_dir: Path) -> None:
    error = _sentence(stasis.fail(ExitCode.NOT_FOUND, "device", "attach", short_dir / "none.img"))
    assert "none.img does not exist" in error
    _nothing_left(stasis)


@pytest.mark.parametrize("name", ["a/b", "x" * 300])
def test_a_name_that_no_device_can_have(stasis: Stasis, image: Path, name: str) -> None:
    error = _sentence(stasis.fail(ExitCode.USAGE, "device", "attach", image, "--name", name))
    assert "cannot be the name of a device" in error
    _nothing_left(stasis)


@pytest.mark.parametrize("path", ["/dev/null", "/proc", "empty"])
def test_what_is_no_disk(stasis: Stasis, short_dir: Path, path: str) -> None:
    (short_dir / "empty").touch()
    _sentence(stasis.fail(ExitCode.USAGE, "device", "attach", short_dir / path))
    _nothing_left(stasis)


@pytest.mark.tool("setpriv")
def test_a_file_that_may_not_be_opened(stasis: Stasis, image: Path) -> None:
    image.chmod(0)
    if os.geteuid() == 0:
        stasis.command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *stasis.command]
    assert "disk.img" in _sentence(stasis.fail(ExitCode.PERMISSION, "device", "attach", image))
    _nothing_left(stasis)


def test_a_device_that_is_attached_already(stasis: Stasis, image: Path) -> None:
    stasis("device", "attach", image)
    other = image.with_name("link.img")
    other.symlink_to(image)
    for path in (image, other):
        assert "already" in _sentence(stasis.fail(ExitCode.BUSY, "device", "attach", path, "--name", "other"))
    _nothing_left(stasis, devices=1)


def test_a_name_that_is_taken(stasis: Stasis, image: Path, short_dir: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    other = short_dir / "other.img"
    other.write_bytes(bytes(MIB))
    assert "--name" in _sentence(stasis.fail(ExitCode.BUSY, "device", "attach", other, "--name", "disk"))
    assert stasis.json("device", "show", "disk")["path"] == str(image)
    _nothing_left(stasis, devices=1)


@pytest.mark.tool("setpriv")
def test_a_kernel_node_that_cannot_be_made(stasis: Stasis, image: Path) -> None:
    if os.geteuid() == 0:
        stasis.command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *stasis.command]
    result = stasis.run("device", "attach", image, "--kernel")
    if result.returncode == 0:
        pytest.skip("this host lets anybody make a block device")
    # For root: no way, or one that did not work.
    expected = (ExitCode.UNSUPPORTED, ExitCode.FAILURE) if os.geteuid() == 0 else (ExitCode.PERMISSION,)
    assert result.returncode in expected
    _sentence(result.stderr)
    _nothing_left(stasis)


@pytest.mark.parametrize("name", ["a@b", "../x", "", ".hidden", "x" * 64])
def test_a_name_that_cannot_be_one(stasis: Stasis, image: Path, name: str) -> None:
    error = stasis.fail(ExitCode.USAGE, "device", "attach", image, f"--name={name}") if name else ""
    if name:
        _sentence(error)
    _nothing_left(stasis)


@pytest.fixture
def mounted_loop(short_dir: Path) -> Iterator[str]:
    backing, target = short_dir / "loop.img", short_dir / "mnt"
    backing.write_bytes(bytes(16 * MIB))
    target.mkdir()
    subprocess.run(["mkfs.ext4", "-q", backing], check=True)
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    device = made.stdout.strip()
    subprocess.run(["mount", device, target], check=True)
    yield device
    subprocess.run(["umount", target], check=True)
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
@pytest.mark.tool("mkfs.ext4", "losetup")
def test_a_device_that_is_mounted_is_refused_with_the_mount(
    stasis: Stasis, mounted_loop: str, short_dir: Path
) -> None:
    error = _sentence(stasis.fail(ExitCode.BUSY, "device", "attach", mounted_loop))
    assert str(short_dir / "mnt") in error
    error = _sentence(stasis.fail(ExitCode.BUSY, "device", "attach", short_dir / "loop.img"))
    assert mounted_loop.removeprefix("/dev/") in error
    _nothing_left(stasis)


@pytest.mark.parametrize("text", ["12X", "", "-1", "1.3", "K", "64KK", "99999999T"])
def test_a_size_that_is_none(stasis: Stasis, image: Path, text: str) -> None:
    _sentence(stasis.fail(ExitCode.USAGE, "device", "attach", image, f"--tracking-block={text}"))
    _nothing_left(stasis)


@pytest.mark.parametrize("size", ["1000", "1K", "1T"])
def test_a_tracking_block_that_cannot_be(stasis: Stasis, image: Path, size: str) -> None:
    _sentence(stasis.fail(ExitCode.USAGE, "device", "attach", image, "--tracking-block", size))
    _nothing_left(stasis)


@pytest.mark.parametrize("verb", ["show", "take", "watch", "destroy"])
@pytest.mark.parametrize("uuid", ["6f1c2a7e-0000-4000-8000-000000000000", "nonsense", ""])
def test_a_snapshot_that_does_not_exist(stasis: Stasis, verb: str, uuid: str) -> None:
    _sentence(stasis.fail(ExitCode.NOT_FOUND, "snapshot", verb, uuid))


@pytest.mark.parametrize("arguments", [("device", "show"), ("device", "detach"), ("map", "info")])
def test_a_device_that_does_not_exist(stasis: Stasis, arguments: tuple[str, str]) -> None:
    _sentence(stasis.fail(ExitCode.NOT_FOUND, *arguments, "none"))


def test_a_second_take(stasis: Stasis, image: Path, storage: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "32M", "disk", "--take")
    assert "already taken" in _sentence(stasis.fail(ExitCode.STATE, "snapshot", "take", uuid))
    _sentence(stasis.fail(ExitCode.BUSY, "snapshot", "add", uuid, "disk"))
    assert stasis.json("snapshot", "show", uuid)["state"] == "taken"


def test_a_snapshot_of_nothing(stasis: Stasis, storage: Path) -> None:
    uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "32M")
    _sentence(stasis.fail(ExitCode.STATE, "snapshot", "take", uuid))
    assert stasis.json("snapshot", "show", uuid)["state"] == "created"
    stasis("snapshot", "destroy", uuid)
    _sentence(stasis.fail(ExitCode.STATE, "snapshot", "create", "--storage", storage, "--limit", "32M", "--take"))
    _nothing_left(stasis)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--storage", "none/file", "--limit", "32M"), ExitCode.NOT_FOUND),
        (("--storage", "disk.img", "--limit", "32M"), ExitCode.BUSY),
        (("--storage", "/dev/null", "--limit", "32M"), ExitCode.STORAGE),
        (("--storage", "large", "--limit", "32M"), ExitCode.STORAGE),
        (("--storage", "memory", "--limit", "1023"), ExitCode.STORAGE),
        (("--storage", "storage", "--limit", "32M", "--chunk", "5000"), ExitCode.USAGE),
        (("--storage", "storage", "--limit", "32M", "disk"), ExitCode.BUSY),
        (("--storage", "storage", "--limit", "32M", "none"), ExitCode.NOT_FOUND),
        (("--storage", "storage", "--limit", "32M", "--tcp", "192.0.2.1:1"), ExitCode.USAGE),
    ],
)
def test_storage_and_devices_that_cannot_be_used(
    stasis: Stasis, image: Path, storage: Path, short_dir: Path, arguments: tuple[str, ...], code: ExitCode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(short_dir)
    (short_dir / "large").write_bytes(bytes(33 * MIB))
    stasis("device", "attach", image, "--name", "disk")
    files = sorted(short_dir.iterdir())
    _sentence(stasis.fail(code, "snapshot", "create", *arguments, "disk", "--take"))
    assert sorted(short_dir.iterdir()) == files
    _nothing_left(stasis, devices=1)
    assert stasis.json("device", "show", "disk")["snapshot"] is None


def test_a_device_in_another_snapshot(stasis: Stasis, image: Path, storage: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "32M", "disk")
    error = stasis.fail(ExitCode.BUSY, "snapshot", "create", "--storage", storage, "--limit", "32M", "disk")
    assert uuid in _sentence(error)
    assert uuid in _sentence(stasis.fail(ExitCode.BUSY, "device", "detach", "disk"))
    assert [entry["id"] for entry in stasis.json("snapshot", "list")] == [uuid]


@pytest.mark.parametrize("ranges", [["0:3M"], ["0:1K", "2M:1"], ["0:0"], ["5"], ["a:b"]])
def test_ranges_outside_the_device_mark_nothing(stasis: Stasis, image: Path, ranges: list[str]) -> None:
    stasis("device", "attach", image, "--name", "disk")
    _sentence(stasis.fail(ExitCode.USAGE, "map", "mark", "disk", *ranges))
    assert stasis.json("map", "changed", "disk", "--since", "0") == []


def test_a_change_number_that_is_ahead(stasis: Stasis, image: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    _sentence(stasis.fail(ExitCode.GENERATION, "map", "changed", "disk", "--since", "3"))
    other = "6f1c2a7e-0000-4000-8000-000000000000"
    error = stasis.fail(ExitCode.GENERATION, "map", "changed", "disk", "--since", "0", "--generation", other)
    assert other in _sentence(error)
    _sentence(stasis.fail(ExitCode.USAGE, "map", "changed", "disk", "--since", "0", "--held"))


@pytest.mark.expects_errors("device.json")
def test_a_damaged_record_of_a_device(stasis: Stasis, image: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    stasis("daemon", "stop")
    record = stasis.state_dir / "devices" / "disk" / "device.json"
    record.write_text("{ this is no JSON")
    shown = stasis.json("device", "show", "disk")
    assert shown["state"] == "failed"
    assert str(record) in shown["error"]
    _sentence(stasis.fail(ExitCode.STATE, "snapshot", "create", "--storage", "memory", "disk", "--take"))
    stasis("device", "detach", "disk", "--forget")
    stasis("device", "attach", image, "--name", "disk")


def test_damaged_settings(stasis: Stasis, image: Path) -> None:
    (stasis.state_dir / "settings.json").write_text("[1, 2")
    assert "settings.json" in _sentence(stasis.fail(ExitCode.STATE, "device", "attach", image))
    assert "settings.json" in _sentence(stasis.fail(ExitCode.STATE, "settings", "show"))
    (stasis.state_dir / "settings.json").unlink()
    _nothing_left(stasis)


@pytest.mark.expects_errors("snapshot.json")
def test_a_damaged_record_of_a_snapshot(stasis: Stasis, image: Path, storage: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "32M", "disk")
    pid = stasis.daemon_pid()
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    (stasis.run_dir / "snapshots" / uuid / "snapshot.json").write_text("{}")
    assert stasis.json("snapshot", "list") == []
    stasis("snapshot", "create", "--storage", storage, "--limit", "32M", "disk", "--take")


def test_a_run_directory_with_too_long_a_path(stasis: Stasis, short_dir: Path) -> None:
    long = short_dir / ("x" * 100)
    assert str(long) in _sentence(stasis.fail(ExitCode.DAEMON, "device", "list", "--run-dir", long))
    assert not long.exists()


def test_a_device_name_too_long_for_its_sockets(stasis: Stasis, image: Path, short_dir: Path) -> None:
    long = short_dir / ("y" * 40)
    name = "z" * 63
    stasis.run_dir = long
    stasis.environment["STASIS_RUN_DIR"] = str(long)
    _sentence(stasis.fail(ExitCode.DAEMON, "device", "attach", image, "--name", name))
    assert list((long / "nbd").iterdir()) == []
    stasis("daemon", "stop")


def test_a_second_daemon(stasis: Stasis) -> None:
    stasis("device", "list")
    error = _sentence(stasis.fail(ExitCode.DAEMON, "daemon"))
    assert str(stasis.daemon_pid()) in error


def test_no_daemon_to_ask(stasis: Stasis) -> None:
    for action in ("status", "stop"):
        _sentence(stasis.fail(ExitCode.DAEMON, "daemon", action))
    assert stasis.daemon_pid() is None


def test_a_run_directory_that_cannot_be_made(stasis: Stasis, image: Path) -> None:
    _sentence(stasis.fail(ExitCode.DAEMON, "device", "list", "--run-dir", image / "run"))


def test_stopping_the_daemon_under_a_snapshot(stasis: Stasis, image: Path, storage: Path) -> None:
    stasis("device", "attach", image, "--name", "disk")
    stasis("snapshot", "create", "--storage", storage, "--limit", "32M", "disk", "--take")
    _sentence(stasis.fail(ExitCode.BUSY, "daemon", "stop"))
    stasis("daemon", "stop", "--force")
    assert stasis.daemon_pid() is None
    assert stasis.json("snapshot", "list") == []
    assert [device["name"] for device in stasis.json("device", "list")] == ["disk"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("bogus",),
        ("device",),
        ("device", "attach"),
        ("device", "attach", "x", "--bogus"),
        ("snapshot", "create", "disk"),
        ("map", "changed", "disk", "--since", "many"),
        ("snapshot", "copy", "a", "b", "c", "--sample", "200"),
        ("settings", "set", "chunk_minimum_shift"),
        ("settings", "set", "chunk_minimum_shift=99"),
        ("settings", "set", "bogus=1"),
        ("completion", "tcsh"),
    ],
)
def test_arguments_that_make_no_sense(stasis: Stasis, arguments: tuple[str, ...]) -> None:
    _sentence(stasis.fail(ExitCode.USAGE, *arguments))


@pytest.mark.parametrize("words", [
    "repo prune --repo r --wait", "repo check --repo r --wait", "backup create disk --repo r --wait",
    "backup copy latest --repo r --to s --wait", "process dump 1 --images i --timeout",
])
@pytest.mark.parametrize("time", ["-1", "nan", "inf", "soon"])
def test_a_time_to_wait_is_a_number_of_seconds(words: str, time: str) -> None:
    with pytest.raises(UsageError, match=f"'{time}' is not a time"):
        build_parser().parse_args([*words.split(), time])


def test_errors_are_json_where_json_was_asked_for(stasis: Stasis) -> None:
    error = stasis.fail(ExitCode.NOT_FOUND, "snapshot", "show", "nonsense", "--json").splitlines()[-1]
    fields = json.loads(error)
    assert fields["error"] == "NotFoundError"
    assert fields["exit_code"] == ExitCode.NOT_FOUND
    assert set(fields) == {"error", "message", "hint", "exit_code", "errno"}


