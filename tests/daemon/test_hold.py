# SPDX-License-Identifier: Apache-2.0
"""A take holds no device longer than `hold_timeout_ms`, whatever another device or the daemon does meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stasis.block.snapshot import SnapshotState
from stasis.daemon.channel import Channel
from stasis.daemon.main import Daemon
from stasis.daemon.paths import Directories
from stasis.daemon.record import DeviceRecord
from stasis.daemon.snapshots import SnapshotOptions
from stasis.errors import StasisError
from stasis.nbd.client import Client
from tests.daemon.helpers import MIB


@pytest.fixture
def daemon(run_dir: Path, state_dir: Path, checklogs: None, make_image: Callable[..., Path]) -> Iterator[Daemon]:
    """A daemon in this process that serves "a" and "b"."""
    directories = Directories(run_dir, state_dir)
    directories.create()
    made = Daemon(directories, {"hold_timeout_ms": 200})
    for name in ("a", "b"):
        made.devices.attach(DeviceRecord(name, str(make_image(name))))
    yield made
    made.shut_down()


def test_a_device_that_is_held_too_long_lets_go_and_the_take_fails(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = daemon.snapshots.create(SnapshotOptions("memory", limit=64 * MIB), ["a", "b"], take=False)
    real = Channel.receive
    client = Client.connect(daemon.devices.find("a").uri, timeout=60)
    served: list[bytes] = []

    def late(channel: Channel, op: str) -> tuple[dict[str, Any], list[int]]:
        """The answer of b is waited for until a, which is held since its own, serves again."""
        if op == "hold" and channel.label == "b":
            served.append(client.pread(0, 4096))
        return real(channel, op)

    monkeypatch.setattr(Channel, "receive", late)
    with client, pytest.raises(StasisError, match=r"worker of a .*hold_timeout_ms") as raised:
        daemon.snapshots.take(snapshot.id)
    monkeypatch.undo()
    assert raised.value.errno == errno.ETIMEDOUT
    assert len(served) == 1
    assert snapshot.state is SnapshotState.CREATED
    again = daemon.snapshots.take(snapshot.id)
    assert again.state is SnapshotState.TAKEN
    assert {member.change_number for member in again.members.values()} == {1}


@pytest.mark.parametrize("milliseconds", [100, 60000])
def test_workers_are_told_what_the_setting_says(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, milliseconds: int
) -> None:
    daemon.devices._overrides = {"hold_timeout_ms": milliseconds}
    real, told = Channel.send, []

    def send(channel: Channel, op: str, descriptors: Any = (), **arguments: Any) -> None:
        if op == "hold":
            told.append((channel.label, arguments["timeout_ms"]))
        real(channel, op, descriptors, **arguments)

    monkeypatch.setattr(Channel, "send", send)
    daemon.snapshots.create(SnapshotOptions("memory", limit=64 * MIB), ["a", "b"], take=True)
    assert told == [("a", milliseconds), ("b", milliseconds)]
