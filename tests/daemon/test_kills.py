# SPDX-License-Identifier: Apache-2.0
"""Processes killed at random moments under load: flushed writes are there, the map covers them, clients go on.

`STASIS_KILLS=100` makes it as many as the project's promise names; the suite has time for fewer.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import stasis as api
from stasis.nbd.client import Client as NbdClient
from tests.daemon.helpers import MIB, await_true, kill, read
from tests.runner import Stasis

SIZE = 8 * MIB
KILLS = int(os.environ.get("STASIS_KILLS", "8"))


class Load(threading.Thread):
    """Writes random blocks and flushes, and reconnects when the server dies. `flushed` is what must be there."""

    def __init__(self, uri: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.flushed: dict[int, bytes] = {}
        self.since: set[int] = set()
        self.rounds = 0
        self.stopping = threading.Event()
        self._uri = uri
        self._random = random.Random(seed)

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                with NbdClient.connect(self._uri, timeout=30) as export:
                    self._write(export)
            except OSError:
                time.sleep(0.01)

    def _write(self, export: NbdClient) -> None:
        while not self.stopping.is_set():
            blocks = {self._random.randrange(SIZE // 4096) * 4096: self._random.randbytes(4096) for _ in range(8)}
            for offset in blocks:
                self.flushed.pop(offset, None)  # from now on either contents may be there
            export.write_many(list(blocks.items()))
            export.flush()
            self.flushed.update(blocks)
            self.since.update(blocks)
            self.rounds += 1


def _connect(stasis: Stasis) -> api.Client:
    return api.connect(stasis.run_dir, stasis.state_dir)


def _kill_something(stasis: Stasis, dice: random.Random) -> str:
    victim = dice.choice(["worker", "worker", "daemon", "both"])
    daemon = stasis.daemon_pid()
    with _connect(stasis) as client:
        worker = client.device("disk").pid
    if victim in ("daemon", "both") and daemon is not None:
        kill(daemon)
    if victim in ("worker", "both") and worker is not None:
        try:
            kill(worker)
        except ProcessLookupError:
            pass  # it died a moment ago and is being replaced
    return victim


def _image(client: api.Client) -> bytes | None:
    """The whole image of the snapshot that is held, None if it says that it is corrupted."""
    (snapshot,) = client.snapshots()
    if snapshot.state == "corrupted":
        return None
    return read(snapshot.device("disk").uri or "", 0, SIZE)


@pytest.mark.expects_errors("")
@pytest.mark.timeout(1200)
def test_flushed_writes_survive_kills_and_the_map_covers_them(
    stasis: Stasis, make_image: Callable[..., Path], storage: Path, seed: int
) -> None:
    dice = random.Random(seed)
    image = make_image("disk", SIZE)
    with _connect(stasis) as client:
        device = client.attach(image)
        generation, number = device.generation, device.change_number
    load = Load(device.uri, seed)
    load.start()
    history = []
    try:
        for _ in range(KILLS):
            rounds = load.rounds
            await_true(lambda rounds=rounds: load.rounds > rounds)  # type: ignore[misc]
            time.sleep(dice.random() / 10)
            with _connect(stasis) as client:
                if dice.random() < 0.5 or not client.collect():
                    for uuid in client.collect():
                        client.destroy(uuid)
                    client.create_snapshot(storage, ["disk"], limit=64 * MIB, take=True)
                before = _image(client)
            history.append(_kill_something(stasis, dice))
            with _connect(stasis) as client:  # without a daemon nobody replaces the worker
                after = _image(client)
            assert after in (before, None), history
            assert after == before or history[-1] == "both" or before is None, history
        with _connect(stasis):
            rounds = load.rounds
            await_true(lambda: load.rounds > rounds + 3)
    finally:
        load.stopping.set()
        load.join(60)
    data = image.read_bytes()
    lost = [offset for offset, block in load.flushed.items() if data[offset : offset + 4096] != block]
    assert not lost, history
    with _connect(stasis) as client:
        shown = client.device("disk")
        if shown.generation == generation:
            changed = client.changed_extents("disk", number or 0)
            covered = {block for e in changed for block in range(e.offset, e.offset + e.length, 4096)}
            assert load.since <= covered, history
        else:
            assert client.map_info("disk").assumed, history
