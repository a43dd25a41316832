# SPDX-License-Identifier: Apache-2.0
"""How a dumper reaches files by the paths that the kernel tells: those of a mount namespace of the tree.

A tree that lives in the dumper's own one has the dumper's paths, also where its processes have another root directory.
For each other one that processes live in an anchor, a helper process, has gone into it and stands at its root.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stasis.linux import process, procfs
from stasis.linux.namespaces import CLONE_NEWNS, join
from stasis.process.helpers import fork_helper, wait_for_helper

if TYPE_CHECKING:
    from stasis.linux.mountinfo import MountInfo

__all__ = ["anchored", "likely", "look_at", "mount_behind", "mount_of", "mounts", "places", "reach", "where"]

_anchors: dict[int, int] = {}
"""By the numbers of mount namespaces: a process that stands there. The first process's comes first."""
_lives: dict[int, int] = {}
"""Of processes: the number of theirs, where there are several. That of the first process comes first."""
_tables: dict[int, dict[int, MountInfo]] = {}


def look_at(pids: Iterable[int]) -> list[int]:
    """Note where these processes live, of which the first one is the first of the tree; within `anchored`. Returns
    those whose namespaces cannot be entered."""
    _tables.clear()
    _lives.clear()
    _lives.update({pid: _number(pid) for pid in pids})
    if len(set(_lives.values())) == 1:
        _lives.clear()
        return []
    ours, refused = _number(procfs.SELF), []
    for pid, number in _lives.items():
        if number != ours and number not in _anchors:
            try:
                _anchors[number] = _anchor(pid)
            except PermissionError:
                refused.append(pid)
    return refused


def _number(pid: int) -> int:
    return os.stat(f"/proc/{pid or 'self'}/ns/mnt").st_ino & 0xFFFFFFFF


def places() -> list[int]:
    """The numbers of the mount namespaces of the tree, that of the first process first; [0] where there is only one."""
    return list(dict.fromkeys(_lives.values())) or [0]


def reach(path: str, place: int = 0) -> str:
    """Where a path of a mount namespace is for us; by default of that of the first process."""
    anchor = _anchor_of(place)
    return f"/proc/{anchor}/root{path}" if anchor else path


def mounts(place: int = 0) -> list[MountInfo]:
    """What is mounted in one."""
    from stasis.linux.mountinfo import mount_table  # 9 ms, which a restore need not wait for

    return mount_table(_anchor_of(place))


def where(pid: int, name: str, status: os.stat_result, mount: int = 0) -> int:
    """A mount that tells in which namespace a file of a process has this path, as images have it: -1 in that of the
    first process. `mount`: that which the file was opened by, 0 where it is not known."""
    if not _lives:
        return -1
    candidates = likely(pid, mount)
    place = next((place for place in candidates if _is_at(reach(name, place), status)), candidates[0])
    if place == places()[0]:
        return -1
    table = _table(place)
    return mount if mount in table else next(iter(table))


def likely(pid: int, mount: int = 0) -> list[int]:
    """All of `places`, in the order in which a file of a process is to be looked for: `mount` is that which it was
    opened by, 0 where it is not known."""
    if not _lives:
        return [0]
    known = [place for place in places() if mount in _table(place)]
    return list(dict.fromkeys((*known, *((_lives[pid],) if pid in _lives else ()), *places())))


def mount_behind(pid: int, link: str) -> int:
    """The number of the mount of what /proc/PID/LINK leads to; 0 where nobody asks for it."""
    if not _lives:
        return 0
    fd = os.open(f"/proc/{pid}/{link}", os.O_PATH | os.O_CLOEXEC)
    try:
        return mount_of(fd)
    finally:
        os.close(fd)


def mount_of(fd: int) -> int:
    """The number of the mount that a descriptor of ours was opened by."""
    fields = dict(line.split(":", 1) for line in procfs.read(procfs.SELF, f"fdinfo/{fd}").decode().splitlines())
    return int(fields.get("mnt_id", 0))


def _table(place: int) -> dict[int, MountInfo]:
    """By number, the root first."""
    if place not in _tables:
        found = {mount.number: mount for mount in mounts(place)}
        _tables[place] = dict(sorted(found.items(), key=lambda item: item[1].parent in found))
    return _tables[place]


def _is_at(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def _anchor_of(place: int) -> int:
    """The process that stands in it; 0 where that is ours. Before anything was looked at there is but one."""
    place = place or places()[0]
    return _anchors.get(place, 0) if place else next(iter(_anchors.values()), 0)


def _anchor(pid: int) -> int:
    """A process that has gone into the mount namespace of another one, and ends with us."""
    reader, writer = os.pipe()
    child = fork_helper()
    if child == 0:
        process.set_parent_death_signal(signal.SIGKILL)
        with contextlib.suppress(OSError):
            join(f"/proc/{pid}/ns/mnt", CLONE_NEWNS)
            os.write(writer, b"j")
            os.close(writer)
            while True:
                signal.pause()
        os._exit(1)
    os.close(writer)
    try:
        if os.read(reader, 1):
            return child
    finally:
        os.close(reader)
    _end(child)
    raise PermissionError(1, "the mount namespace cannot be entered", str(pid))


def _end(anchor: int) -> None:
    os.kill(anchor, signal.SIGKILL)
    wait_for_helper(anchor)


@contextmanager
def anchored(pid: int = 0) -> Iterator[None]:
    """Have anchors, which end with us; one in the mount namespace of the process that a tree begins with, where that is
    not ours."""
    before = dict(_anchors)
    try:
        if pid:
            _anchors[_number(pid)] = _anchor(pid)
        yield
    finally:
        for number in set(_anchors) - set(before):
            _end(_anchors.pop(number))
        _lives.clear()
        _tables.clear()
