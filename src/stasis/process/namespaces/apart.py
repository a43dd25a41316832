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

JOINED = ("cgroup", "time", "uts", "ipc", "net", "mnt")
"""In this order: what is needed to join others is reached by paths."""
SHOWN = ("ipc", "net")
"""What some file systems show of whoever mounts them."""


class Apart:
    """Kinds and numbers as the images have them. One that an image does not tell is that of the first process."""

    def __init__(self, first: TaskKobjIdsEntry, others: Iterable[TaskKobjIdsEntry], home: TaskKobjIdsEntry) -> None:
        self._home = _numbers(home, {})
        self._first = _numbers(first, self._home)
        self._now = dict(self._first)
        self._wanted: dict[tuple[str, int], None] = {}
        self._fds: dict[tuple[str, int], int] = {}
        self._roots: dict[int, int] = {}
        self._lives: dict[int, dict[str, int]] = {}
        for ids in others:
            numbers = _numbers(ids, self._first)
            self._lives.setdefault(numbers["mnt"], numbers)
            for name, number in numbers.items():
                if number != self._first[name]:
                    self._wanted[name, number] = None

    def __bool__(self) -> bool:
        return bool(self._wanted)

    @property
    def has_mounts(self) -> bool:
        """Whether there are several mount namespaces."""
        return any(name == "mnt" for name, _ in self._wanted)

    @property
    def mounts(self) -> list[int]:
        """The mount namespaces to be made, that of the first process the last one."""
        wanted = [number for name, number in self._wanted if name == "mnt"]
        return [number for number in (*wanted, self._first["mnt"]) if number != self._home["mnt"]]

    def make(self, chain: list[ImageSet], settings: Settings) -> None:
        """In the first process, before it goes into namespaces of its own, and leaves it where it was."""
        from stasis.process.namespaces.own import make_namespace

        for name, number in self._wanted:
            if name not in JOINED:
                raise UnsupportedError(f"a process lives in another {name} namespace than the first one, "
                                       "which cannot be restored")  # fmt: skip
            if name == "mnt":
                continue
            with _unchanged(name):
                if number != self._home[name]:
                    make_namespace(name, number, chain, settings)
                self._fds[name, number] = _current(name)

    def note_own(self) -> None:
        """In the first process, when it is in its own namespaces: these are descriptors for others, too."""
        for name in {name for name, _ in self._wanted if name != "mnt"}:
            self._fds[name, self._first[name]] = _current(name)

    def make_mounts(self, chain: list[ImageSet], settings: Settings) -> None:
        """In the first process, when it is in its other namespaces: mount namespaces, where there are several. It goes
        into its own."""
        from stasis.process.namespaces.imports import import_all
        from stasis.process.namespaces.mounthelper import make_elsewhere

        import_all()
        self._fds["mnt", self._home["mnt"]] = _current("mnt")
        self._roots[self._home["mnt"]] = _root()
        for number, (namespace, root) in make_elsewhere(self.mounts, chain[0], settings).items():
            self._fds["mnt", number], self._roots[number] = namespace, root
        if self._first["mnt"] != self._home["mnt"]:
            self._join("mnt", self._first["mnt"])

    def move(self, move: Callable[[int], int]) -> None:
        """Have the descriptors where `move` takes them."""
        self._fds = {key: move(fd) for key, fd in self._fds.items()}
        self._roots = {key: move(fd) for key, fd in self._roots.items()}

    def enter(self, ids: TaskKobjIdsEntry, *, but: str = "") -> None:
        """In a process of the tree: go where it lived, from where its parent is; `but` a kind."""
        numbers = _numbers(ids, self._first)
        for name in JOINED:
            if numbers[name] != self._now[name] and name != but:
                self._join(name, numbers[name])
                self._now[name] = numbers[name]

    def _join(self, name: str, number: int) -> None:
        join_fd(self._fds[name, number], FLAGS[name])
        if name == "mnt":  # the root of a namespace may not be that of those who lived there before us
            os.fchdir(self._roots[number])
            os.chroot(".")

    @contextmanager
    def inside(self, name: str, number: int | None) -> Iterator[None]:
        """In the first process: be in one for a moment. Those that nobody lives in are as our own."""
        fd = self._fds.get((name, number or 0))
        if fd is None or number is None or number == self._now[name]:
            yield
            return
        before = self._now[name]
        with _unchanged(name):
            self._join(name, number)
            self._now[name] = number
            yield
            self._now[name] = before

    @contextmanager
    def living_in(self, mounts: int) -> Iterator[None]:
        """In the first process: be in what file systems show that one has mounted who lives in a mount namespace."""
        with contextlib.ExitStack() as stack:
            for name in SHOWN:
                stack.enter_context(self.inside(name, self._lives.get(mounts, self._first)[name]))
            yield

    def path(self, path: str, mounts: int) -> str:
        """A path of a mount namespace as it is from where we are."""
        root = self._roots.get(mounts)
        return path if root is None or mounts == self._now["mnt"] else f"/proc/self/fd/{root}{path}"

    def is_home(self, mounts: int) -> bool:
        """Whether a mount namespace is that of the restorer."""
        return mounts == self._home["mnt"]

    @property
    def here(self) -> int:
        """The mount namespace that we are in."""
        return self._now["mnt"]

    @property
    def first(self) -> int:
        """That of the first process."""
        return self._first["mnt"]

    def descriptor(self, name: str, number: int) -> int | None:
        """One that stands for it; None where it is not known."""
        fd = self._fds.get((name, number))
        return None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _numbers(ids: TaskKobjIdsEntry, unknown: dict[str, int]) -> dict[str, int]:
    return {name: getattr(ids, field, None) or unknown.get(name, 0) for name, field in NAMESPACES.items()}


def _current(name: str) -> int:
    return os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)


def _root() -> int:
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


@contextmanager
def _unchanged(name: str) -> Iterator[None]:
    """Come back to where we are now."""
    ours = _current(name)
    try:
        with _same_groups() if name == "cgroup" else _same_directories() if name == "mnt" else contextlib.nullcontext():
            yield
            join_fd(ours, FLAGS[name])
    finally:
        os.close(ours)


@contextmanager
def _same_directories() -> Iterator[None]:
    """Whoever joins a mount namespace is at its root then."""
    root, directory = _root(), os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(directory)
    finally:
        os.close(root)
        os.close(directory)


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
