# SPDX-License-Identifier: Apache-2.0
"""A disk as a user has it: an image file, served by the command line, with a reference copy kept beside it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stasis.nbd.client import Client
from tests.runner import Stasis

__all__ = ["LONG", "MIB", "Disk", "Load", "fio", "fio_command", "fio_result", "snapshot", "tool", "wait_until"]

MIB = 1 << 20
LONG = os.environ.get("STASIS_LONG") == "1"
"""Set STASIS_LONG=1 for ten times the rounds."""
PATIENCE = 30.0
"""Seconds after which something that should happen at once counts as not happening."""


def tool(*command: str | Path, status: Sequence[int] = (0,), **options: Any) -> str:
    """Run a peer's program; its output, if it ended with one of `status`."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **options)
    assert result.returncode in status, f"{command} returned {result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout


def fio_command(uri: str, *options: str) -> list[str]:
    """fio writing and verifying through NBD; later options replace earlier ones."""
    return ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=16",
            "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
            "--output-format=json", *options]  # fmt: skip


def fio_result(report: str) -> dict[str, Any]:
    """The one job of a report, which had no error."""
    job: dict[str, Any] = json.loads(report[report.index("{") :])["jobs"][0]
    assert job["error"] == 0
    return job


def fio(uri: str, *options: str) -> dict[str, Any]:
    return fio_result(tool(*fio_command(uri, *options)))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


@contextmanager
def snapshot(stasis: Stasis, storage: str | Path, *devices: str, limit: str = "256M") -> Iterator[dict[str, Any]]:
    """A taken snapshot as `show --json` gives it, destroyed at the end."""
    uuid = stasis("snapshot", "create", "--storage", storage, "--limit", limit, *devices, "--take")
    try:
        yield stasis.json("snapshot", "show", uuid)
    finally:
        stasis("snapshot", "destroy", uuid)


class Disk:
    """An attached image file; `expected` is what it must hold, kept up by whoever writes through `change`."""

    def __init__(self, stasis: Stasis, path: Path, size: int, seed: int, *options: str) -> None:
        self.random = random.Random(seed)
        self.path, self.size, self.name = path, size, path.name.partition(".")[0]
        self.expected = bytearray(self.random.randbytes(size))
        path.write_bytes(self.expected)
        self.uri = stasis("device", "attach", path, "--name", self.name, *options)

    def change(self, client: Client, count: int) -> None:
        """Random writes, discards and zeroes of random sizes, unaligned where the export takes it."""
        for _ in range(count):
            offset, length = self.draw(client.minimum_block)
            kind = self.random.choice(("write", "write", "write", "trim", "zero"))
            if kind == "write":
                self.write(client, offset, self.random.randbytes(length))
            else:
                self.clear(client, offset, length, trim=kind == "trim")

    def draw(self, block: int, longest: int = 300_000) -> tuple[int, int]:
        """A random range, aligned to `block` but for the end of the device."""
        blocks = -(-self.size // block)
        first = self.random.randrange(blocks)
        count = self.random.randint(1, max(1, min(blocks - first, int(longest ** self.random.random()) // block)))
        return first * block, min(count * block, self.size - first * block)

    def write(self, client: Client, offset: int, data: bytes) -> None:
        client.pwrite(offset, data)
        self.expected[offset : offset + len(data)] = data

    def clear(self, client: Client, offset: int, length: int, *, trim: bool) -> None:
        """Zeroes, or a discard, which on a file reads as zeroes wherever it was effective."""
        if trim:
            client.trim(offset, length)
            self.expected[offset : offset + length] = client.pread(offset, length)
        else:
            client.write_zeroes(offset, length)
            self.expected[offset : offset + length] = bytes(length)

    def read(self, uri: str | None = None) -> bytes:
        """The whole device, or the whole image at `uri`."""
        with Client.connect(uri or self.uri, timeout=PATIENCE) as client:
            return b"".join(client.pread(offset, min(MIB, self.size - offset)) for offset in range(0, self.size, MIB))


class Load:
    """A client that writes at random, flushes, and reconnects when the server goes away, as good clients do.

    `flushed` is the number of writes known to be durable, `log` every write that was sent, in order. A write that
    was sent again after a reconnection stands in the log once.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.log: list[tuple[int, bytes]] = []
        self.flushed = self.reconnections = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def wait_for(self, writes: int) -> None:
        """Wait until so many more writes are durable."""
        goal = self.flushed + writes
        wait_until(lambda: self.flushed >= goal or self.failure is not None, f"{writes} flushed writes")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._round()
        except BaseException as error:  # it belongs to the thread of the test
            self.failure = error

    def _round(self) -> None:
        batch = []
        for _ in range(self.disk.random.randint(1, 8)):
            offset, length = self.disk.draw(4096, 60_000)
            batch.append((offset, self.disk.random.randbytes(length)))
        self.log += batch
        deadline = time.monotonic() + PATIENCE
        while not self._try(batch):
            self.reconnections += 1
            assert time.monotonic() < deadline, "the server did not come back"
            time.sleep(0.005)
        for offset, data in batch:
            self.disk.expected[offset : offset + len(data)] = data
        self.flushed += len(batch)

    def _try(self, batch: list[tuple[int, bytes]]) -> bool:
        try:
            with Client.connect(self.disk.uri, timeout=PATIENCE) as client:
                for offset, data in batch:
                    client.pwrite(offset, data)
                client.flush()
        except OSError:
            return False
        return True
