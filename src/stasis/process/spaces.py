# SPDX-License-Identifier: Apache-2.0
"""Processes of one tree that live in different namespaces, while they are dumped: which there are, and being in one for
a moment, because the kernel tells of it only there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stasis.errors import PermissionDeniedError
from stasis.linux.namespaces import FLAGS, join_fd
from stasis.process.dump.ids import NAMESPACES, Home, namespace_ids

if TYPE_CHECKING:
    from stasis.process.findings import Findings

__all__ = [
    "check_socket", "everywhere", "has_own", "inside", "inside_of", "is_apart", "lives", "lives_in", "look_at",
    "spaces",
]  # fmt: skip

SIOCGSKNS = 0x894C  # include/uapi/linux/sockios.h; since Linux 4.10 (commit c62cce2caee5)
TOLD_INSIDE = ("uts", "ipc", "net")

_found: dict[tuple[str, int], int] = {}


def look_at(pids: Iterable[int]) -> None:
    """Note the namespaces of these processes; the first process first."""
    _found.clear()
    for pid in pids:
        for name, number in _numbers(pid).items():
            _found.setdefault((name, number), pid)


def spaces() -> dict[tuple[str, int], int]:
    """A process that lives in it for each namespace of the tree, by kind and number, without those of the dumper."""
    home = Home.ids()
    return {(name, number): pid for (name, number), pid in _found.items() if home.get(NAMESPACES[name]) != number}


def _numbers(pid: int) -> dict[str, int]:
    ids = namespace_ids(pid)
    return {name: ids[field] for name, field in NAMESPACES.items() if field in ids}


@contextmanager
def inside(name: str, pid: int) -> Iterator[None]:
    """Be in the namespace of a process, if the kernel tells what is in it only there."""
    if name not in TOLD_INSIDE:
        yield
        return
    fd = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _in(name, fd):
            yield
    finally:
        os.close(fd)


@contextmanager
def _in(name: str, fd: int) -> Iterator[None]:
    ours = os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.path.samestat(os.fstat(fd), os.fstat(ours)):
            yield
            return
        Home.remember()
        _enter(name, fd)
        try:
            yield
        finally:
            join_fd(ours, FLAGS[name])
    finally:
        os.close(ours)


def _enter(name: str, fd: int) -> None:
    try:
        join_fd(fd, FLAGS[name])
    except PermissionError as error:
        raise PermissionDeniedError(f"entering a {name} namespace of the tree needs CAP_SYS_ADMIN",
                                    hint="run as root") from error  # fmt: skip


def everywhere(name: str) -> Iterator[None]:
    """Be in each namespace of a kind that the tree has, one after the other; in ours first."""
    yield
    for (kind, _), pid in list(_found.items()):
        if kind == name and os.path.exists(f"/proc/{pid}"):  # of an earlier dump it may be gone
            with inside(name, pid):
                yield


@contextmanager
def inside_of(sock: int) -> Iterator[int]:
    """Be in the network namespace of a socket; its number, 0 where it cannot be told."""
    try:
        fd = fcntl.ioctl(sock, SIOCGSKNS)
    except OSError:  # without CAP_NET_ADMIN there, or an old kernel
        yield 0
        return
    try:
        number = os.fstat(fd).st_ino & 0xFFFFFFFF
        with _in("net", fd):
            yield number
    finally:
        os.close(fd)


def lives(name: str) -> list[int]:
    """A process for each namespace of a kind that the tree lives in."""
    return [pid for (kind, _), pid in _found.items() if kind == name]


def is_apart(name: str, number: int) -> bool:
    """Whether it is another one of the tree than that of its first process."""
    first = next((known for kind, known in _found if kind == name), number)
    return number not in (0, first)


def lives_in(name: str, number: int) -> bool:
    """Whether a process of the tree lives in this one."""
    return (name, number & 0xFFFFFFFF) in _found


def has_own(name: str, pid: int) -> bool:
    """Whether a process lives in another one than the dumper."""
    return _numbers(pid).get(name) != Home.ids().get(NAMESPACES[name])


def check_socket(pid: int, where: str, number: int, findings: Findings) -> None:
    """Note a socket of a network namespace that nobody of the tree lives in."""
    if number and _found and not lives_in("net", number):
        findings.add(pid, where, "it is of a network namespace in which no process of the tree lives")
