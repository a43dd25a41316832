# SPDX-License-Identifier: Apache-2.0
"""Namespaces in which processes of a restore live apart from the first one. All are made by the first process, each
once, before it goes into its own; descriptors for them are inherited, and whoever lives in one joins it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stasis.errors import StasisError, UnsupportedError
from stasis.linux.namespaces import FLAGS, join_fd
from stasis.process.dump.ids import NAMESPACES

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.tasks import TaskKobjIdsEntry
    from stasis.process.namespaces.own import Settings

__all__ = ["Apart"]

JOINED = ("cgroup", "time", "uts", "ipc", "net")
"""In this order."""


class Apart:
    """Kinds and numbers as the images have them. One that an image does not tell is that of the first process."""

    def __init__(self, first: TaskKobjIdsEntry, others: Iterable[TaskKobjIdsEntry], home: TaskKobjIdsEntry) -> None:
        self._home = _numbers(home, {})
        self._first = _numbers(first, self._home)
        self._now = dict(self._first)
        self._wanted: dict[tuple[str, int], None] = {}
        self._fds: dict[tuple[str, int], int] = {}
        for ids in others:
            for name, number in _numbers(ids, self._first).items():
                if number != self._first[name]:
                    self._wanted[name, number] = None

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def make(self, chain: list[ImageSet], settings: Settings) -> None:
        """In the first process, before it goes into namespaces of its own, and leaves it where it was."""
        from stasis.process.namespaces.own import make_namespace

        for name, number in self._wanted:
            if name not in JOINED:
                raise UnsupportedError(f"a process lives in another {name} namespace than the first one, "
                                       "which cannot be restored")  # fmt: skip
            with _unchanged(name):
                if number != self._home[name]:
                    make_namespace(name, number, chain, settings)
                self._fds[name, number] = _current(name)

    def note_own(self) -> None:
        """In the first process, when it is in its own namespaces: these are descriptors for others, too."""
        for name in {name for name, _ in self._wanted}:
            self._fds[name, self._first[name]] = _current(name)

    def move(self, move: Callable[[int], int]) -> None:
        """Have the descriptors where `move` takes them."""
        self._fds = {key: move(fd) for key, fd in self._fds.items()}

    def enter(self, ids: TaskKobjIdsEntry) -> None:
        """In a process of the tree: go where it lived, from where its parent is."""
        for name, number in _numbers(ids, self._first).items():
            if number != self._now[name]:
                join_fd(self._fds[name, number], FLAGS[name])
                self._now[name] = number

    @contextmanager
    def inside(self, name: str, number: int | None) -> Iterator[None]:
        """In the first process: be in one for a moment. Those that nobody lives in are as our own."""
        fd = self._fds.get((name, number or 0))
        if fd is None or number == self._first[name]:
            yield
            return
        with _unchanged(name):
            join_fd(fd, FLAGS[name])
            yield

    def descriptor(self, name: str, number: int) -> int | None:
        """One that stands for it; None where it is not known."""
        fd = self._fds.get((name, number))
        return None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _numbers(ids: TaskKobjIdsEntry, unknown: dict[str, int]) -> dict[str, int]:
    return {name: getattr(ids, field, None) or unknown.get(name, 0) for name, field in NAMESPACES.items()}


def _current(name: str) -> int:
    return os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _unchanged(name: str) -> Iterator[None]:
    """Come back to where we are now."""
    ours = _current(name)
    try:
        with _same_groups() if name == "cgroup" else contextlib.nullcontext():
            yield
            join_fd(ours, FLAGS[name])
    finally:
        os.close(ours)


@contextmanager
def _same_groups() -> Iterator[None]:
    """Whoever makes a cgroup namespace is in its groups then."""
    from stasis.process.cgroups import enter, groups_of, hierarchies

    before = groups_of(os.getpid())
    yield
    places = hierarchies()
    for name, path in before:
        if name in places and dict(groups_of(os.getpid())).get(name) != path and (
                problem := enter(os.getpid(), name, path, places)):
            raise StasisError(f"the cgroup namespace cannot be left: {problem}")
