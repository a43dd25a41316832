# SPDX-License-Identifier: Apache-2.0
"""Commands print what their documentation promises."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import stasis as api
from stasis.errors import ExitCode
from tests.runner import Stasis

MIB = 1 << 20
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture
def disk(stasis: Stasis, short_dir: Path) -> Path:
    path = short_dir / "disk.img"
    path.write_bytes(os.urandom(2 * MIB))
    stasis("device", "attach", path, "--name", "disk")
    return path


@pytest.fixture
def snapshot(stasis: Stasis, disk: Path) -> str:
    return stasis("snapshot", "create", "--storage", "memory", "--limit", "32M", "disk", "--take")


def test_attach_prints_the_uri_alone_and_says_that_it_started_the_daemon(stasis: Stasis, short_dir: Path) -> None:
    (short_dir / "a.img").write_bytes(bytes(MIB))
    result = stasis.run("device", "attach", short_dir / "a.img")
    assert result.stdout == f"nbd+unix:///a.img?socket={stasis.run_dir}/nbd/a.img.sock\n"
    assert re.fullmatch(r"stasis: started the daemon \(pid [0-9]+\)\n", result.stderr)
    (short_dir / "b.img").write_bytes(bytes(MIB))
    assert stasis.run("device", "attach", short_dir / "b.img").stderr == ""


def test_device_list_tells_every_uri(stasis: Stasis, disk: Path) -> None:
    (entry,) = stasis.json("device", "list")
    assert (entry["name"], entry["path"], entry["size"], entry["node"]) == ("disk", str(disk), 2 * MIB, None)
    assert entry["uri"].startswith("nbd+unix:///disk?socket=")
    table = stasis("device", "list").splitlines()
    assert table[0].split() == ["NAME", "SIZE", "STATE", "NODE", "PATH", "URI"]
    assert "2 MiB" in table[1]


def test_device_show_tells_what_the_worker_did(stasis: Stasis, disk: Path, snapshot: str) -> None:
    shown = stasis.json("device", "show", "disk")
    assert shown["snapshot"] == snapshot
    assert shown["worker"]["snapshot"]["id"] == snapshot
    assert "change number   1" in stasis("device", "show", "disk")


def test_snapshot_create_prints_the_uuid_alone(stasis: Stasis, disk: Path, snapshot: str) -> None:
    assert UUID.fullmatch(snapshot)
    assert stasis("snapshot", "collect") == snapshot
    assert snapshot in stasis("snapshot", "list")
    assert stasis.json("snapshot", "collect") == [snapshot]


def test_snapshot_show_has_the_documented_fields(stasis: Stasis, disk: Path, snapshot: str) -> None:
    shown = stasis.json("snapshot", "show", snapshot)
    assert (shown["id"], shown["state"], shown["error_code"]) == (snapshot, "taken", 0)
    assert shown["hold_ns"] > 0
    assert {"path", "kind", "filled", "requested", "capacity", "limit"} <= set(shown["storage"])
    assert (shown["storage"]["path"], shown["storage"]["limit"]) == ("memory", 32 * MIB)
    (device,) = shown["devices"]
    assert {"name", "uri", "error_code", "generation", "change_number"} <= set(device)
    assert (device["name"], device["error_code"], device["change_number"]) == ("disk", 0, 1)
    text = stasis("snapshot", "show", snapshot[:8])
    assert device["uri"] in text
    assert "of at most 32 MiB" in text


def test_storage_may_be_a_descriptor_of_the_caller(stasis: Stasis, disk: Path, short_dir: Path) -> None:
    fd = os.open(short_dir, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        made = subprocess.run(
            [*stasis.command, "snapshot", "create", "--storage", f"/dev/fd/{fd}", "--limit", "32M", "disk", "--take"],
            env=stasis.environment, pass_fds=[fd], capture_output=True, text=True, check=True)
    finally:
        os.close(fd)
    assert stasis.json("snapshot", "show", made.stdout.strip())["storage"]["path"] == "descriptor"


def test_copy_whole_and_changes_only(stasis: Stasis, disk: Path, snapshot: str, short_dir: Path) -> None:
    target = short_dir / "copy.img"
    said = stasis("snapshot", "copy", snapshot, "disk", target, "--verify")
    assert "copied 2 MiB" in said
    assert "read back 2 MiB: equal" in said
    assert target.read_bytes() == disk.read_bytes()
    stasis("snapshot", "destroy", snapshot)
    uri = stasis.json("device", "show", "disk")["uri"]
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 9 1M 64K", uri], check=True, capture_output=True)
    second = stasis("snapshot", "create", "--storage", "memory", "disk", "--take")
    lines = stasis("snapshot", "copy", second, "disk", target, "--since", "1", "--json").splitlines()
    assert json.loads(lines[-1])["message_type"] == "summary"
    assert json.loads(lines[-1])["bytes_copied"] == 65536
    assert target.read_bytes() == disk.read_bytes()


def test_copy_refuses_a_wrong_generation_by_name(
    stasis: Stasis, disk: Path, snapshot: str, short_dir: Path
) -> None:
    target = short_dir / "copy.img"
    stasis("snapshot", "copy", snapshot, "disk", target)
    other = "6f1c2a7e-0000-4000-8000-000000000000"
    command = ("snapshot", "copy", snapshot, "disk", target, "--since", "0", "--generation", other)
    assert other in stasis.fail(ExitCode.GENERATION, *command)
    assert "none" in stasis.fail(ExitCode.NOT_FOUND, "snapshot", "copy", snapshot, "none", target)


def test_copy_of_a_snapshot_that_is_not_taken(stasis: Stasis, disk: Path, short_dir: Path) -> None:
    uuid = stasis("snapshot", "create", "--storage", "memory", "disk")
    stasis.fail(ExitCode.STATE, "snapshot", "copy", uuid, "disk", short_dir / "copy.img")
    assert not (short_dir / "copy.img").exists()


def test_watch_prints_json_lines_and_ends_with_the_snapshot(stasis: Stasis, short_dir: Path) -> None:
    (short_dir / "disk.img").write_bytes(bytes(MIB) + os.urandom(31 * MIB))
    uri = stasis("device", "attach", short_dir / "disk.img", "--name", "disk")
    stasis("settings", "set", f"diff_storage_minimum={MIB}")
    snapshot = stasis("snapshot", "create", "--storage", "memory", "--limit", "2M", "disk", "--take")
    watchers = [stasis.popen("snapshot", "watch", snapshot, "--json"), stasis.popen("snapshot", "watch", snapshot)]
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 9 8M 16M", uri], check=True, capture_output=True)
    lines, text = _until("corrupted", watchers[0]), _until("corrupted", watchers[1])
    stasis("snapshot", "destroy", snapshot)
    rest = [watcher.communicate(timeout=30)[0] for watcher in watchers]
    assert [watcher.returncode for watcher in watchers] == [0, 0]
    assert rest == ["", ""]
    events = [json.loads(line) for line in lines]
    assert {event["snapshot"] for event in events} == {snapshot}
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert "corrupted: the image of disk is lost" in text[-1]


def _until(word: str, watcher: subprocess.Popen[str]) -> list[str]:
    """The lines that a watcher prints, up to the first one with the word in it."""
    assert watcher.stdout is not None
    lines = [watcher.stdout.readline()]
    while word not in lines[-1]:
        assert lines[-1], "the watcher ended"
        lines.append(watcher.stdout.readline())
    return lines


def test_an_interrupted_command_ends_with_130(stasis: Stasis, disk: Path, snapshot: str) -> None:
    watcher = stasis.popen("snapshot", "watch", snapshot, "--json")
    os.truncate(disk, 3 * MIB)
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["event"] == "generation"
    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=30)
    assert watcher.returncode == ExitCode.INTERRUPTED


def test_maps(stasis: Stasis, disk: Path, snapshot: str, short_dir: Path) -> None:
    info = stasis.json("map", "info", "disk")
    assert (info["block_size"], info["block_count"], info["change_number"]) == (65536, 32, 1)
    stasis("map", "mark", "disk", "64K:1", "1M:128K")
    expected = [{"offset": 65536, "length": 65536}, {"offset": MIB, "length": 2 * 65536}]
    assert stasis.json("map", "changed", "disk", "--since", "1") == expected
    assert stasis.json("map", "changed", "disk", "--since", "0", "--held") == expected
    assert stasis("map", "changed", "disk", "--since", "1").splitlines()[1].split() == ["65536", "65536"]
    stasis("map", "read", "disk", "--output", short_dir / "map")
    assert (short_dir / "map").read_bytes() == b"\0\2" + bytes(14) + b"\2\2" + bytes(14)
    stasis("map", "read", "disk", "--held", "--output", short_dir / "map")
    assert (short_dir / "map").read_bytes()[1] == 1
    assert "clean" in stasis("map", "info", "disk")


def test_settings(stasis: Stasis) -> None:
    stasis("settings", "set", "hold_timeout_ms=2000", "chunk_minimum_shift=17")
    assert stasis.json("settings", "show")["hold_timeout_ms"] == 2000
    assert re.search(r"^chunk_minimum_shift +17$", stasis("settings", "show"), re.MULTILINE)


def test_directories_may_stand_before_or_behind_the_command(
    stasis: Stasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(stasis.environment, "STASIS_RUN_DIR")
    monkeypatch.delitem(stasis.environment, "STASIS_STATE_DIR")
    directories = ("--run-dir", stasis.run_dir, "--state-dir", stasis.state_dir)
    assert json.loads(stasis(*directories, "device", "list", "--json")) == []
    assert json.loads(stasis("daemon", "status", *directories, "--json"))["run_dir"] == str(stasis.run_dir)
    stasis("device", *directories, "list")
    monkeypatch.undo()


def test_a_config_file_gives_directories_and_settings(stasis: Stasis, short_dir: Path) -> None:
    config = short_dir / "config.toml"
    config.write_text(f'run_dir = "{stasis.run_dir}"\n[settings]\nhold_timeout_ms = 1234\n')
    environment = dict(stasis.environment)
    del environment["STASIS_RUN_DIR"]
    daemon = subprocess.Popen([*stasis.command, "daemon", "--config", config], env=environment,
                              stderr=subprocess.DEVNULL)
    try:
        _wait_for_daemon(stasis, daemon)
        with api.connect(stasis.run_dir, stasis.state_dir) as client:
            assert client.settings()["hold_timeout_ms"] == 1234
            assert client.status().pid == daemon.pid
    finally:
        daemon.terminate()
        status = daemon.wait(30)
    assert status == 0
    config.write_text("run_dir = 5\n")
    assert "run_dir" in stasis.fail(ExitCode.USAGE, "daemon", "--config", config)
    stasis.fail(ExitCode.NOT_FOUND, "daemon", "--config", short_dir / "none")


def _wait_for_daemon(stasis: Stasis, daemon: subprocess.Popen[bytes]) -> None:
    """Until it answers: a client that may start one would be faster than the one under test."""
    deadline = time.monotonic() + 30
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(str(stasis.run_dir / "control.sock")):
            assert daemon.poll() is None, "the daemon ended"
            assert time.monotonic() < deadline, "the daemon did not come up"
            time.sleep(0.02)


def test_daemon_status_and_stop(stasis: Stasis, disk: Path) -> None:
    pid = stasis.daemon_pid()
    shown = stasis.json("daemon", "status")
    assert (shown["pid"], shown["devices"], shown["snapshots"]) == (pid, 1, 0)
    stasis("daemon", "stop")
    assert stasis.daemon_pid() is None
    assert not (stasis.run_dir / "control.sock").exists()
    assert list((stasis.run_dir / "nbd").iterdir()) == []


@pytest.mark.tool("nbdinfo")
def test_serve_without_a_daemon_by_socket_activation(stasis: Stasis, short_dir: Path) -> None:
    image = short_dir / "disk.img"
    image.write_bytes(os.urandom(MIB))
    shown = subprocess.run(["nbdinfo", "--size", "--", "[", *stasis.command, "device", "serve", image, "]"],
                           env=stasis.environment, capture_output=True, text=True)
    assert (shown.stdout.strip(), shown.returncode) == (str(MIB), 0), shown.stderr
    assert stasis.daemon_pid() is None


def test_serve_on_a_socket(stasis: Stasis, short_dir: Path) -> None:
    image, path = short_dir / "disk.img", short_dir / "sock"
    image.write_bytes(os.urandom(MIB))
    server = stasis.popen("device", "serve", image, "--socket", path)
    while not path.exists():
        assert server.poll() is None
    uri = f"nbd+unix:///?socket={path}"
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64K", uri], check=True, capture_output=True)
    server.terminate()
    server.communicate(timeout=30)
    assert server.returncode == 0
    assert image.read_bytes()[:65536] == b"\7" * 65536
    assert not path.exists()
    assert "--socket" in stasis.fail(ExitCode.USAGE, "device", "serve", image)


def test_every_command_has_help_with_its_options(stasis: Stasis) -> None:
    assert "first steps:" in stasis("--help")
    assert "examples:" in stasis("snapshot", "create", "--help")
    assert stasis.daemon_pid() is None


def test_version(stasis: Stasis) -> None:
    assert stasis("version") == api.__version__
    assert stasis.json("version") == {"version": api.__version__}
    assert stasis("--version") == f"stasis {api.__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(stasis: Stasis, shell: str) -> None:
    pytest.importorskip("shtab")
    script = stasis("completion", shell)
    assert "snapshot" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_reader_that_has_seen_enough_is_no_error(stasis: Stasis) -> None:
    command = " ".join(stasis.command)
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command} settings show | head -1"],
                            env=stasis.environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
