# SPDX-License-Identifier: Apache-2.0
"""A snapshot of two devices is of one instant: what was written to A before B is never seen the other way round.

`STASIS_TAKES=200` makes it as many takes as the project's promise names; the suite has time for fewer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import stasis as api
from stasis.nbd.client import Client as NbdClient
from tests.daemon.helpers import MIB, await_true, read

TAKES = int(os.environ.get("STASIS_TAKES", "8"))
BLOCK = 4096


class Writer(threading.Thread):
    """Puts the same number on A and then, when A has answered, on B; other writers keep both devices busy."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(daemon=True)
        self.number = 0
        self.stopping = threading.Event()
        self._uris = first, second

    def run(self) -> None:
        with NbdClient.connect(self._uris[0], timeout=60) as a, NbdClient.connect(self._uris[1], timeout=60) as b:
            while not self.stopping.is_set():
                self.number += 1
                block = self.number.to_bytes(8, "little").ljust(BLOCK, b"\0")
                a.pwrite(0, block)
                b.pwrite(0, block)


class Noise(threading.Thread):
    """Writes all over a device, so that the number's writer is not alone in any batch."""

    def __init__(self, uri: str, stopping: threading.Event) -> None:
        super().__init__(daemon=True)
        self._uri, self._stopping = uri, stopping

    def run(self) -> None:
        with NbdClient.connect(self._uri, timeout=60) as export:
            while not self._stopping.is_set():
                export.write_many([(MIB + number * 65536, os.urandom(BLOCK)) for number in range(32)])


def test_no_image_pair_shows_the_second_device_ahead_of_the_first(
    client: api.Client, make_image: Callable[..., Path]
) -> None:
    a, b = (client.attach(make_image(name)) for name in ("a", "b"))
    writer = Writer(a.uri, b.uri)
    threads: list[threading.Thread] = [writer, *(Noise(device.uri, writer.stopping) for device in (a, b))]
    for thread in threads:
        thread.start()
    pairs = []
    try:
        for _ in range(TAKES):
            number = writer.number
            await_true(lambda number=number: writer.number > number + 2)  # type: ignore[misc]
            snapshot = client.create_snapshot("memory", ["a", "b"], limit=64 * MIB, take=True)
            pairs.append([int.from_bytes(read(snapshot.device(name).uri or "", 0, 8), "little") for name in "ab"])
            client.destroy(snapshot.id)
    finally:
        writer.stopping.set()
        for thread in threads:
            thread.join(60)
    assert all(second <= first <= second + 1 for first, second in pairs), pairs
    assert len({first for first, _ in pairs}) == TAKES
