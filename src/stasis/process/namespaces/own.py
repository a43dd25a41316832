# SPDX-License-Identifier: Apache-2.0
"""Which namespaces a tree has of its own, and what is looked for, written and made again for all of them.

All processes of a tree live in those of its first one. A module for a kind has `check`, which notes what cannot be
kept, `write`, which runs in a worker that has entered what it needs (`dump/inside.py`), and `make`, which runs in the
first process of a restore and leaves it in a namespace with everything in it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from stasis.process.dump.ids import NAMESPACES, Home, namespace_ids, own_kinds, own_kinds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.tasks import TaskKobjIdsEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.mounting import Copies
    from stasis.process.tree import Task

__all__ = ["Settings", "check_namespaces", "make_namespaces", "write_namespaces"]

MODULES = {
    "user": "user", "pid": "pids", "cgroup": "cgroup", "time": "times", "uts": "uts", "ipc": "ipc", "net": "net",
    "mnt": "mnt",
}  # fmt: skip
"""In the order in which they are made."""
FOR_CHILDREN = {"pid": "pid_for_children", "time": "time_for_children"}


class Settings(NamedTuple):
    """What the caller of a restore decides. `links`: what the other ends of network devices of the tree are called in
    the namespace that we come from, as NAME or NAME@BRIDGE. `map_path`: where a path outside is now.
    `copies`: of mounts outside, where the first process may not make them."""

    links: Mapping[str, str]
    map_path: Callable[[str], str]
    copies: Copies | None = None


def check_namespaces(root: Task, living: Sequence[Task], findings: Findings) -> None:
    """Note what cannot be kept of the namespaces of a tree."""
    first = namespace_ids(root.pid)
    for task in living:
        theirs = namespace_ids(task.pid)
        for name, field in NAMESPACES.items():
            if theirs.get(field) != first.get(field):
                findings.add(task.pid, f"{name} namespace", "it is another one than that of the tree's first process")
        for name, link in FOR_CHILDREN.items():
            if _differs(task.pid, name, link):
                findings.add(task.pid, f"{name} namespace", "its children are to live in another one than itself")
    for name in own_kinds(Home.ids(), first):
        _module(name).check(root.pid, findings)


def _differs(pid: int, name: str, link: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/{link}") != os.readlink(f"/proc/{pid}/ns/{name}")
    except FileNotFoundError:
        return False  # a kernel without it, or no child yet that the namespace is made for


def write_namespaces(root: int, out: ImageSetWriter) -> list[str]:
    """Write what is in the namespaces that the tree of the process `root` has of its own. Returns what is lost and of
    little weight, a sentence for each."""
    first = namespace_ids(root)
    warnings: list[str] = []
    for name in own_kinds(Home.ids(), first):
        warnings += _module(name).write(root, first[NAMESPACES[name]], out)
    return warnings


def make_namespaces(ids: TaskKobjIdsEntry, chain: list[ImageSet], settings: Settings) -> None:
    """In the first process of a restore: go into namespaces of our own, with what the images say is in them."""
    own = own_kinds_of(chain[0], ids)
    for name in MODULES:
        if name in own:
            _module(name).make(getattr(ids, NAMESPACES[name]), chain, settings)


def _module(name: str) -> Any:
    return importlib.import_module(f"stasis.process.namespaces.{MODULES[name]}")
