# SPDX-License-Identifier: Apache-2.0
"""A store in a dictionary whose clock, listings and faults belong to the test."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from stasis.backup.repo import Repository
from stasis.backup.repo.config import Config
from stasis.backup.repo.store import Buffer, ObjectInfo
from stasis.errors import NotFoundError
from tests.backup.stored import CHUNK

__all__ = ["DictStore", "Killed", "repository_on"]


class Killed(BaseException):
    """The process that used the store is no more. No code of ours may catch it."""


class DictStore:
    """Follows `Store`. `before` is called before each request with its kind and may raise or wait."""

    url = "dict:"
    parallelism = 1
    cheap_lookup = True

    def __init__(self, clock: Callable[[], float] = lambda: 0.0, *, lag: float = 0.0, seed: int = 0) -> None:
        self.clock = clock
        self.listing_lag = lag
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.before: Callable[[str, str], None] = lambda kind, name: None
        self._history: dict[str, tuple[float, float | None]] = {}  # when each object was last put, and deleted
        self._source = random.Random(seed)

    def put(self, name: str, *parts: Buffer) -> bool:
        self.before("put", name)
        if name in self.objects:
            return False
        self.objects[name] = (b"".join(parts), self.clock())
        self._history[name] = (self.clock(), None)
        return True

    stage = put

    def get(self, name: str) -> bytes:
        self.before("get", name)
        if name not in self.objects:
            raise NotFoundError(f"{name} is not there")
        return self.objects[name][0]

    def get_into(self, name: str, buffers: Sequence[memoryview]) -> int:
        content = memoryview(self.get(name))
        for buffer in buffers:
            part, content = content[: len(buffer)], content[len(buffer) :]
            buffer[: len(part)] = part
        return len(self.objects[name][0])

    def exists(self, name: str) -> bool:
        self.before("exists", name)
        return name in self.objects

    def stat(self, name: str) -> ObjectInfo | None:
        self.before("stat", name)
        return self._info(name) if name in self.objects else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """What was put or deleted less than the lag ago may show or not."""
        self.before("list", prefix)
        started = self.clock()
        shown = []
        for name, (put, deleted) in self._history.items():
            if prefix and not name.startswith(f"{prefix}/"):
                continue
            settled = put <= started - self.listing_lag
            if deleted is None:
                visible = settled or self._source.random() < 0.5
            else:
                visible = deleted > started - self.listing_lag and self._source.random() < 0.5
            if visible:
                shown.append(self._info(name) if name in self.objects else ObjectInfo(name, 0, put))
        return iter(shown)

    def delete(self, name: str) -> None:
        self.before("delete", name)
        if self.objects.pop(name, None) is not None:
            self._history[name] = (self._history[name][0], self.clock())

    def sync(self) -> None:
        self.before("sync", "")

    def clean(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def _info(self, name: str) -> ObjectInfo:
        content, modified = self.objects[name]
        return ObjectInfo(name, len(content), modified)


def repository_on(store: DictStore) -> Repository:
    """A repository in a store, opened anew: as another process sees it."""
    return Repository(store, Config("0" * 32, CHUNK, "none"), None)
