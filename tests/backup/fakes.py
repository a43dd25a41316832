# SPDX-License-Identifier: Apache-2.0
"""Chunks and indexes in memory, whose every fetch is seen and can be made to fail or to hang."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator, Sequence

from stasis.backup.repo.index import NAMES_PER_SEGMENT, ZERO
from stasis.errors import DamagedError

__all__ = ["CHUNK", "FakeIndex", "FakeReader", "FakeStore", "image"]

CHUNK = 8192


def image(size: int, seed: int, *, zeroes: bool = True) -> bytes:
    """Random contents; with `zeroes` about a third of the chunks holds none but zeroes."""
    draw = random.Random(seed)
    chunks = [bytes(CHUNK) if zeroes and draw.random() < 0.35 else draw.randbytes(CHUNK)
              for _ in range(-(-size // CHUNK))]
    return b"".join(chunks)[:size]


class Fetched(list[bytes]):
    """The names that were fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def add(self, name: bytes) -> None:
        with self.changed:
            self.append(name)
            self.changed.notify_all()

    def wait_for(self, name: bytes, patience: float = 30) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: name in self, patience)


class FakeStore:
    def __init__(self) -> None:
        self.chunks: dict[bytes, bytes] = {}
        self.damaged: set[bytes] = set()
        self.fetched = Fetched()
        self.asked = threading.Event()
        self.hang = threading.Event()

    def add(self, data: bytes) -> bytes:
        if not any(data):
            return ZERO
        name = hashlib.sha256(data).digest()
        self.chunks[name] = data
        return name

    def damage(self, name: bytes) -> None:
        self.damaged.add(name)

    def repair(self) -> None:
        self.damaged.clear()


class FakeReader:
    def __init__(self, store: FakeStore) -> None:
        self.store = store

    def fetch(self, name: bytes, into: memoryview) -> None:
        self.store.asked.set()
        while self.store.hang.is_set():
            threading.Event().wait(0.01)
        if name in self.store.damaged:
            raise DamagedError(f"chunk {name.hex()} is altered")
        assert len(into) == len(self.store.chunks[name])
        into[:] = self.store.chunks[name]
        self.store.fetched.add(name)


class FakeIndex:
    def __init__(self, store: FakeStore, data: bytes = b"", *, names: Sequence[bytes] | None = None) -> None:
        starts = range(0, len(data), CHUNK)
        self.list = list(names) if names is not None else [store.add(data[at : at + CHUNK]) for at in starts]
        self.size = len(data) if names is None else len(self.list) * CHUNK
        self.chunk_size = CHUNK
        self.count = len(self.list)

    def name(self, number: int) -> bytes:
        return self.list[number]

    def names(self, first: int, count: int) -> Iterator[bytes]:
        return iter(self.list[first : first + count])

    def segment_names(self) -> Sequence[bytes]:
        segments = (self.list[at : at + NAMES_PER_SEGMENT] for at in range(0, self.count, NAMES_PER_SEGMENT))
        return [hashlib.sha256(b"".join(segment)).digest() for segment in segments]
