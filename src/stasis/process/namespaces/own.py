# SPDX-License-Identifier: Apache-2.0
"""Which namespaces a tree has of its own, and what is looked for, written and made again for all of them.

Each is looked at, written and made once, whichever processes live in it. A module for a kind has `check`, which notes
what cannot be kept, `write`, which runs in what it needs (`dump/inside.py`, `spaces.py`), both with a process that
lives there, and `make`, which runs in the first process of a restore and leaves it in one with everything in it.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from stasis.linux import sysvshm
from stasis.linux.kcmp import Kcmp, compare
from stasis.process import roots, spaces
from stasis.process.dump.ids import NAMESPACES, namespace_ids, own_kinds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.tasks import TaskKobjIdsEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.mounting import Copies
    from stasis.process.tree import Task

__all__ = ["MODULES", "Settings", "check_namespaces", "make_namespace", "make_namespaces", "write_namespaces"]

MODULES = {
    "user": "user", "pid": "pids", "cgroup": "cgroup", "time": "times", "uts": "uts", "ipc": "ipc", "net": "net",
    "mnt": "mnt",
}  # fmt: skip
"""In the order in which they are made."""
COMMON = ("pid", "user")
"""In these all processes of a tree have to live."""
FOR_CHILDREN = {"pid": "pid_for_children", "time": "time_for_children"}


NOTHING: Mapping[int, Copies] = MappingProxyType({})


class Settings(NamedTuple):
    """What the caller of a restore decides. `links`: what the other ends of network devices of the tree are called in
    the namespace that we come from, as NAME or NAME@BRIDGE. `map_path`: where a path outside is now.
    `copies`: of mounts outside, by mount namespace, where the first process may not make them. `living_in`: be in the
    other namespaces of those who live in a mount namespace for a moment."""

    links: Mapping[str, str]
    map_path: Callable[[str], str]
    copies: Mapping[int, Copies] = NOTHING
    living_in: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()


def check_namespaces(root: Task, living: Sequence[Task], findings: Findings) -> None:
    """Note what cannot be kept of the namespaces of a tree."""
    first = namespace_ids(root.pid)
    pids = [root.pid, *(task.pid for task in living if task is not root)]
    spaces.look_at(pids)
    for pid in roots.look_at(pids):
        findings.add(pid, "mnt namespace", "it is another one than that of the first process, and entering it needs "
                                           "CAP_SYS_ADMIN")  # fmt: skip
    for task in living:
        theirs = namespace_ids(task.pid)
        for name in COMMON:
            if theirs.get(NAMESPACES[name]) != first.get(NAMESPACES[name]):
                findings.add(task.pid, f"{name} namespace", "it is another one than that of the tree's first process")
        for name, link in FOR_CHILDREN.items():
            if _differs(task.pid, name, link):
                findings.add(task.pid, f"{name} namespace", "its children are to live in another one than itself")
    for (name, _), pid in spaces.spaces().items():
        with spaces.inside(name, pid):
            _module(name).check(pid, findings)
    _check_apart(living, findings)


def _check_apart(living: Sequence[Task], findings: Findings) -> None:
    """What only trees have that live in more than one namespace of a kind."""
    for task in living:
        for child in task.children:
            if not child.is_zombie and _numbers(task) != _numbers(child) and not compare(Kcmp.VM, task.pid, child.pid):
                reason = f"it shares its memory with process {task.pid}, which lives in other ones"
                findings.add(child.pid, "namespaces", reason)
    known: set[int] = set()
    for pid in spaces.lives("ipc") if len(spaces.lives("ipc")) > 1 else ():
        with spaces.inside("ipc", pid):
            ids = set(sysvshm.segments())
        for number in sorted(known & ids):
            findings.add(pid, f"System V segment {number}", "another one of the tree has the same id in its IPC "
                                                            "namespace, and images cannot tell them apart")  # fmt: skip
        known |= ids


def _numbers(task: Task) -> dict[str, int]:
    return namespace_ids(task.pid)


def _differs(pid: int, name: str, link: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/{link}") != os.readlink(f"/proc/{pid}/ns/{name}")
    except FileNotFoundError:
        return False  # a kernel without it, or no child yet that the namespace is made for


def write_namespaces(out: ImageSetWriter) -> list[str]:
    """Write what is in the namespaces that the tree has of its own. Returns what is lost and of
    little weight, a sentence for each."""
    warnings: list[str] = []
    for (name, number), pid in spaces.spaces().items():
        with spaces.inside(name, pid):
            warnings += _module(name).write(pid, number, out)
    return list(dict.fromkeys(warnings))


def make_namespaces(
    ids: TaskKobjIdsEntry, chain: list[ImageSet], settings: Settings, but: Sequence[str] = ()
) -> None:
    """In the first process of a restore: go into namespaces of our own, with what the images say is in them."""
    own = own_kinds_of(chain[0], ids)
    for name in MODULES:
        if name in own and name not in but:
            make_namespace(name, getattr(ids, NAMESPACES[name]), chain, settings)


def make_namespace(name: str, number: int, chain: list[ImageSet], settings: Settings) -> None:
    """Go into one."""
    _module(name).make(number, chain, settings)


def _module(name: str) -> Any:
    return importlib.import_module(f"stasis.process.namespaces.{MODULES[name]}")
