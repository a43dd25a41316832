# SPDX-License-Identifier: Apache-2.0
"""The load of the demo and its checks: numbered writes to both disks, and reads that do not trust the copy job."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from stasis.nbd.client import Client

STEP = 4 << 20
"""Bytes compared at a time."""
BATCH = 32
"""Writes in flight."""


class SlottedFile(NamedTuple):
    """A file on a disk image, by the numbers of its blocks. Overwriting these leaves the file system consistent."""

    blocks: list[int]
    block_size: int

    def offset(self, slot: int) -> int:
        """Byte offset on the disk of the file's block `slot`."""
        return self.blocks[slot] * self.block_size


class Load:
    """Writes to both disks from a thread: a sequence number to the first, then to the second, then at random."""

    def __init__(self, uris: Mapping[str, str], files: Mapping[str, SlottedFile]) -> None:
        self.written = 0
        self._files = files
        self._clients = {name: Client.connect(uri) for name, uri in uris.items()}
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for client in self._clients.values():
            client.close()
        if self._failure is not None and error is None:
            raise self._failure

    def _guarded(self) -> None:
        # A failure must not pass in silence: it is raised again where the load ends.
        try:
            self._write()
        except OSError as error:
            self._failure = error

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            for name, client in self._clients.items():
                file = self._files[name]
                client.pwrite(file.offset(0), block(number, file.block_size))
                client.write_many(self._random_writes(file, number))
                self.written += (BATCH + 1) * file.block_size

    def _random_writes(self, file: SlottedFile, number: int) -> list[tuple[int, bytes]]:
        # Slot 0 is the sequence number's. No slot twice in a batch: its writes are in flight together.
        slots = random.sample(range(1, len(file.blocks)), min(BATCH, len(file.blocks) - 1))
        return [(file.offset(slot), block(number, file.block_size)) for slot in slots]


def block(number: int, size: int) -> bytes:
    """A block whose every eight bytes tell which write it is of."""
    return struct.pack("<Q", number) * (size // 8)


class Checks:
    """Looks at copies with other means than those that made them."""

    def __init__(self, files: Mapping[str, SlottedFile]) -> None:
        self._files = files

    def same_bytes(self, uri: str, copy: Path) -> int:
        """Compare a whole image, read over NBD, with a copy; bytes compared. Raises OSError where they differ."""
        client = Client.connect(uri)
        try:
            with copy.open("rb") as file:
                for offset in range(0, client.size, STEP):
                    length = min(STEP, client.size - offset)
                    if bytes(client.pread(offset, length)) != file.read(length):
                        raise OSError(f"{copy.name} differs from the snapshot in {length} bytes at {offset}")
                if file.read(1):
                    raise OSError(f"{copy.name} is longer than the snapshot")
            return client.size
        finally:
            client.close()

    def sequence_number(self, name: str, copy: Path) -> int:
        """The number in a copy's first slot."""
        with copy.open("rb") as file:
            file.seek(self._files[name].offset(0))
            return int(struct.unpack("<Q", file.read(8))[0])
