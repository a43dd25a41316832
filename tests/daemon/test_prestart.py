# SPDX-License-Identifier: Apache-2.0
"""Image servers that start before their snapshot is taken: they serve it then, and nobody is left waiting without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import stasis as api
from stasis.daemon.child import LOG_VARIABLE, Prestarted
from stasis.linux import process
from tests.daemon.helpers import MIB, alive, await_true, kill, read
from tests.runner import Stasis

MakeImage = Callable[..., Path]


def servers(snapshot: str) -> list[int]:
    """The image servers of a snapshot, and what they forked."""
    logs = ((pid, process.variable(pid, LOG_VARIABLE) or "") for pid in process.processes())
    return [pid for pid, log in logs if log.endswith(f"@{snapshot[:8]}.log") and alive(pid)]


def test_the_server_that_waits_is_the_one_that_serves(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    image = make_image()
    device = client.attach(image)
    made = client.create_snapshot(storage, [device.name], limit=64 * MIB, soon=True)
    (waiting,) = servers(made.id)
    taken = client.take(made.id)
    assert read(taken.device(device.name).uri or "", 0, 4 * MIB) == image.read_bytes()
    assert waiting in servers(made.id)
    client.destroy(made.id)
    assert servers(made.id) == []


def test_a_device_that_is_added_later_is_served_too(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    for name in ("a", "b"):
        client.attach(make_image(name))
    made = client.create_snapshot(storage, ["a"], limit=64 * MIB, soon=True)
    client.add(made.id, "b")
    taken = client.take(made.id)
    assert all(len(read(member.uri or "", 0, 512)) == 512 for member in taken.devices)


def test_a_snapshot_that_is_never_taken_leaves_no_server(client: api.Client, make_image: MakeImage,
                                                         storage: Path) -> None:
    device = client.attach(make_image())
    made = client.create_snapshot(storage, [device.name], limit=64 * MIB, soon=True)
    assert len(servers(made.id)) == 1
    client.destroy(made.id)
    assert servers(made.id) == []


def test_a_server_that_died_waiting_is_replaced(client: api.Client, make_image: MakeImage, storage: Path) -> None:
    image = make_image()
    device = client.attach(image)
    made = client.create_snapshot(storage, [device.name], limit=64 * MIB, soon=True)
    for pid in servers(made.id):
        kill(pid)
    taken = client.take(made.id)
    assert read(taken.device(device.name).uri or "", 0, 4 * MIB) == image.read_bytes()


def test_a_killed_daemon_leaves_no_server_waiting(client: api.Client, stasis: Stasis, make_image: MakeImage,
                                                  storage: Path) -> None:
    device = client.attach(make_image())
    made = client.create_snapshot(storage, [device.name], limit=64 * MIB, soon=True)
    kill(client.status().pid)
    await_true(lambda: servers(made.id) == [])
    with api.connect(stasis.run_dir, stasis.state_dir) as again:
        taken = again.take(made.id)
        assert len(read(taken.device(device.name).uri or "", 0, 512)) == 512


def test_what_is_told_later_has_its_descriptors(tmp_path: Path) -> None:
    """The numbers that a configuration names are those of the process that reads it."""
    (tmp_path / "origin").write_bytes(b"origin")
    (tmp_path / "other").write_bytes(b"other")
    program = tmp_path / "reads_its_configuration.py"
    program.write_text("import json, os, sys\n"
                       "from stasis.block.serving import read_config\n"
                       "config = read_config(sys.argv[1:])\n"
                       "print(os.read(config['origin_fd'], 9), os.read(config['tcp']['listen_fds'][0], 9),\n"
                       "      config['buffered_fd'], config['size'], len(config['path']))\n")
    log = tmp_path / "log"
    with (tmp_path / "origin").open("rb") as origin, (tmp_path / "other").open("rb") as other, \
            pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        prestarted = Prestarted(program.stem, log)
        child = prestarted.go(
            {"origin_fd": origin.fileno(), "tcp": {"listen_fds": [other.fileno()]}, "buffered_fd": None,
             "size": 1 << 40, "path": "x" * 100_000}, [origin.fileno(), other.fileno()])
        assert child is not None
        assert child.wait(30)
        child.close()
    assert log.read_text() == f"b'origin' b'other' None {1 << 40} 100000\n"
