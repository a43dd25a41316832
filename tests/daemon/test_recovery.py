# SPDX-License-Identifier: Apache-2.0
"""Nothing is lost when a worker, an image server or the daemon dies, and a restart goes on where it stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import stasis as api
from stasis.daemon import main
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.paths import Directories
from stasis.errors import StasisError
from stasis.linux import process
from stasis.nbd.client import Client as NbdClient
from tests.daemon.helpers import MIB, alive, await_true, kill, read, write
from tests.runner import Stasis

MakeImage = Callable[..., Path]


def _again(stasis: Stasis) -> api.Client:
    return api.connect(stasis.run_dir, stasis.state_dir)


def _kill_daemon(stasis: Stasis) -> None:
    pid = stasis.daemon_pid()
    assert pid is not None
    kill(pid)


def _answers_with_eio(uri: str) -> bool:
    """Whether the server of an image is there again; then it must not give any data."""
    try:
        read(uri, 0, 4096)
    except OSError as error:
        return error.errno == errno.EIO
    raise AssertionError(f"{uri} can be read")


def _image_pid(stasis: Stasis, snapshot: api.Snapshot) -> int:
    entry = json.loads((stasis.run_dir / "snapshots" / snapshot.id / "snapshot.json").read_text())
    return int(entry["members"][0]["image_pid"])


def _write_hard(uri: str, offset: int, data: bytes) -> None:
    """As a client that reconnects: again until it is told that it worked."""

    def done() -> bool:
        try:
            write(uri, offset, data)
        except OSError:
            return False
        return True

    await_true(done)


@pytest.mark.expects_errors("died; starting it again")
def test_a_worker_that_dies_is_replaced_and_the_snapshot_stays_right(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image)
    before = image.read_bytes()
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    write(device.uri, 0, b"a" * 4096)
    pid = client.device(device.name).pid
    assert pid is not None
    kill(pid)
    _write_hard(device.uri, MIB, b"b" * 70000)
    shown = client.device(device.name)
    assert shown.pid not in (None, pid)
    assert shown.generation == device.generation
    uri = snapshot.device(device.name).uri or ""
    assert read(uri, 0, 4 * MIB) == before
    write(uri, 0, b"image")
    assert read(uri, 0, 5) == b"image"
    assert client.changed_extents(device.name, 1) == [api.Extent(0, 65536), api.Extent(MIB, 131072)]


@pytest.mark.expects_errors("died; starting it again")
def test_workers_killed_under_load_lose_nothing_that_was_flushed(
    client: api.Client, make_image: MakeImage, storage: Path, seed: int
) -> None:
    image = make_image("disk.img", 8 * MIB)
    device = client.attach(image)
    before = image.read_bytes()
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    written: dict[int, bytes] = {}
    stop = threading.Event()

    def load() -> None:
        number = seed
        while not stop.is_set():
            number = (number * 1103515245 + 12345) % (1 << 31)
            offset, data = number % 2048 * 4096, os.urandom(4096)
            _write_hard(device.uri, offset, data)
            written[offset] = data

    writer = threading.Thread(target=load)
    writer.start()
    for _ in range(3):
        count = len(written)
        await_true(lambda count=count: len(written) > count + 5)
        pid = client.device(device.name).pid
        if pid is not None:
            kill(pid)
    count = len(written)
    await_true(lambda: len(written) > count)
    stop.set()
    writer.join()
    data = image.read_bytes()
    assert all(data[offset : offset + 4096] == block for offset, block in written.items())
    assert read(snapshot.device(device.name).uri or "", 0, 8 * MIB) == before
    changed = client.changed_extents(device.name, 1)
    assert all(any(e.offset <= offset < e.offset + e.length for e in changed) for offset in written)


@pytest.mark.expects_errors("the image server of")
def test_an_image_server_that_dies_is_replaced(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image)
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    kill(_image_pid(stasis, snapshot))
    assert read(snapshot.device(device.name).uri or "", 0, 4096) == image.read_bytes()[:4096]


def test_a_dead_daemon_stops_nobody_and_the_next_one_takes_over(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image, name="disk")
    before = image.read_bytes()
    snapshot = client.create_snapshot(storage, ["disk"], limit=64 * MIB, take=True)
    pid, image_pid = client.device("disk").pid, _image_pid(stasis, snapshot)
    with NbdClient.connect(device.uri, timeout=30) as export:
        _kill_daemon(stasis)
        export.pwrite(0, b"n" * 4096)
        assert read(snapshot.device("disk").uri or "", 0, 4 * MIB) == before
        with _again(stasis) as other:
            export.pwrite(MIB, b"m" * 4096)
            assert other.device("disk").pid == pid
            assert _image_pid(stasis, snapshot) == image_pid
            shown = other.snapshot(snapshot.id)
            assert (shown.state, shown.error_code) == ("taken", 0)
            assert shown.storage.filled > 0
            assert read(shown.device("disk").uri or "", 0, 4 * MIB) == before
            with pytest.raises(api.StateError):
                other.take(snapshot.id)
            other.destroy(snapshot.id)
            assert not alive(image_pid)
            second = other.create_snapshot(storage, ["disk"], limit=64 * MIB, take=True)
            assert second.device("disk").change_number == 2


@pytest.mark.expects_errors("died; starting it again", "the image server of")
def test_processes_adopted_from_an_earlier_daemon_are_replaced_too(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    image = make_image()
    device = client.attach(image, name="disk")
    before = image.read_bytes()
    snapshot = client.create_snapshot(storage, ["disk"], limit=64 * MIB, take=True)
    _kill_daemon(stasis)
    with _again(stasis) as other:
        kill(_image_pid(stasis, snapshot))
        kill(other.device("disk").pid or 0)
        _write_hard(device.uri, 0, b"n" * 4096)
        uri = snapshot.device("disk").uri or ""

        def readable() -> bool:
            try:
                return read(uri, 0, 4 * MIB) == before
            except OSError:
                return False  # its socket is made anew

        await_true(readable)


@pytest.mark.expects_errors("was taking when the daemon died")
def test_a_take_that_a_daemon_did_not_finish_is_undone(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    device = client.attach(make_image())
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    _kill_daemon(stasis)
    path = stasis.run_dir / "snapshots" / snapshot.id / "snapshot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "taking"}))
    kill(_image_pid(stasis, snapshot))
    with _again(stasis) as other:
        assert other.collect() == []
        again = other.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
        assert again.state == "taken"


def test_a_snapshot_that_was_not_taken_survives_a_daemon(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    device = client.attach(make_image())
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB)
    _kill_daemon(stasis)
    with _again(stasis) as other:
        assert other.take(snapshot.id).state == "taken"


@pytest.mark.expects_errors("")
def test_a_device_that_nobody_held_makes_its_image_unreadable_and_says_so(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    for name in ("a", "b"):
        client.attach(make_image(name))
    snapshot = client.create_snapshot(storage, ["a", "b"], limit=64 * MIB, take=True)
    pid = client.device("a").pid or 0
    _kill_daemon(stasis)
    kill(pid)
    with _again(stasis) as other:
        shown = other.snapshot(snapshot.id)
        assert shown.state == "corrupted"
        assert shown.device("a").error_code < 0
        assert shown.device("b").error_code == 0
        await_true(lambda: _answers_with_eio(shown.device("a").uri or ""))
        assert [event.device for event in other.wait_events(snapshot.id, timeout=0)] == ["a"]
        assert other.device("a").state == "serving"


def test_a_clean_restart_serves_the_same_devices_with_the_same_maps(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    device = client.attach(make_image(), name="disk", tracking_block=1 << 17)
    client.destroy(client.create_snapshot(storage, ["disk"], limit=64 * MIB, take=True).id)
    write(device.uri, 0, b"kept")
    client.stop()
    await_true(lambda: stasis.daemon_pid() is None)
    with _again(stasis) as other:
        shown = other.device("disk")
        assert (shown.generation, shown.change_number, shown.tracking_block) == (device.generation, 1, 1 << 17)
        assert other.changed_extents("disk", 1) == [api.Extent(0, 1 << 17)]
        assert other.map_info("disk").assumed == ""
        assert read(shown.uri, 0, 4) == b"kept"


def test_a_daemon_can_leave_devices_and_snapshots_to_the_next_one(
    stasis: Stasis, client: api.Client, make_image: MakeImage, storage: Path
) -> None:
    device = client.attach(make_image())
    snapshot = client.create_snapshot(storage, [device.name], limit=64 * MIB, take=True)
    pid = client.device(device.name).pid
    with NbdClient.connect(device.uri, timeout=30) as export:
        client.stop(keep_serving=True)
        await_true(lambda: stasis.daemon_pid() is None)
        export.pwrite(0, b"x" * 4096)
        with _again(stasis) as other:
            export.pwrite(4096, b"x" * 4096)
            assert other.device(device.name).pid == pid
            assert other.snapshot(snapshot.id).state == "taken"


def test_two_commands_that_start_the_daemon_at_once_share_one(stasis: Stasis) -> None:
    commands = [stasis.popen("device", "list", "--json") for _ in range(4)]
    for command in commands:
        out, err = command.communicate(timeout=60)
        assert (command.returncode, json.loads(out)) == (0, []), err
    with api.connect(stasis.run_dir, stasis.state_dir, start_daemon=False) as client:
        assert client.status().pid == stasis.daemon_pid()


def test_a_stale_socket_is_replaced(stasis: Stasis, client: api.Client) -> None:
    _kill_daemon(stasis)
    assert (stasis.run_dir / "control.sock").exists()
    with _again(stasis) as other:
        assert other.status().pid == stasis.daemon_pid()


def test_the_worker_of_an_attach_that_a_daemon_did_not_finish_is_ended(
    stasis: Stasis, client: api.Client, make_image: MakeImage
) -> None:
    image = make_image()
    device = client.attach(image)
    pid = client.device(device.name).pid or 0
    _kill_daemon(stasis)
    (stasis.state_dir / "devices" / device.name / "device.json").unlink()
    with _again(stasis) as other:
        assert other.devices() == []
        assert not alive(pid)
        assert other.attach(image).state == "serving"


@pytest.mark.expects_errors("died; starting it again")
def test_a_worker_that_a_daemon_had_no_time_to_note_is_ended(
    stasis: Stasis, client: api.Client, make_image: MakeImage
) -> None:
    image = make_image()
    device = client.attach(image)
    runtime = stasis.run_dir / "workers" / f"{device.name}.json"
    before = runtime.read_text()
    kill(json.loads(before)["pid"])
    await_true(lambda: runtime.read_text() != before)
    pid = json.loads(runtime.read_text())["pid"]
    _kill_daemon(stasis)
    runtime.write_text(before)
    with _again(stasis) as other:
        assert not alive(pid)
        assert other.device(device.name).state == "serving"
        assert read(device.uri, 0, 4096) == image.read_bytes()[:4096]


def test_what_is_left_of_a_take_that_was_not_noted_is_removed(
    stasis: Stasis, client: api.Client, make_image: MakeImage
) -> None:
    device = client.attach(make_image())
    snapshot = client.create_snapshot("memory", [device.name], limit=64 * MIB, take=True)
    server = _image_pid(stasis, snapshot)
    left = [server, *process.children(server)]
    _kill_daemon(stasis)
    (stasis.run_dir / "snapshots" / snapshot.id / "snapshot.json").unlink()
    with _again(stasis) as other:
        assert other.collect() == []
        assert [pid for pid in left if alive(pid)] == []
        assert list((stasis.run_dir / "snapshots").iterdir()) == []
        assert [path.name for path in (stasis.run_dir / "nbd").iterdir()] == [f"{device.name}.sock"]
        assert other.create_snapshot("memory", [device.name], limit=64 * MIB, take=True).state == "taken"


def test_nothing_else_changes_the_registries_meanwhile(
    run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads that watch nodes and mounts run already: one wrote the tracers' file as the recovery did, and the
    daemon of a boot ended with ENOENT."""
    others = []

    def recovering(devices: DeviceKeeper, _: object) -> None:
        other = threading.Thread(target=lambda: others.append(devices.lock.acquire(blocking=False)))
        other.start()
        other.join()
        raise StasisError("that was all")

    monkeypatch.setattr(main, "recover", recovering)
    monkeypatch.setattr(main, "set_priority", lambda *_: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    directories = Directories(run_dir, state_dir)
    directories.create()
    daemon = main.Daemon(directories, {})
    try:
        with pytest.raises(StasisError, match="that was all"):
            main._serve(daemon, directories.control_socket, None)
    finally:
        daemon.shut_down()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert others == [False]
