# SPDX-License-Identifier: Apache-2.0
"""Pid namespaces (pid_namespaces(7)) of which a tree's first process is the first one. Nothing is in them but
processes: the worker that dumps is inside, and the restore begins in a new one (`restore/container.py`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stasis.linux import process, procfs

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "write"]


def check(root: int, findings: Findings) -> None:
    """Note processes that came in from outside: they are not in the tree, and end with its first process."""
    if root != 1:
        findings.add(root, "pid namespace", "it is not the first process of its own pid namespace")
        return
    known = {*_below(root), *_below(os.getpid())}
    for pid in process.processes():
        if pid not in known and os.path.exists(f"/proc/{pid}"):
            findings.add(pid, "pid namespace", f"{process.name(pid)} has entered it and is not in the tree")


def _below(pid: int) -> set[int]:
    found, waiting = {pid}, [pid]
    while waiting:
        one = waiting.pop()
        try:
            new = {child for tid in procfs.threads(one) for child in procfs.children(one, tid)} - found
        except ProcessLookupError:
            continue
        found |= new
        waiting += new
    return found


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """Nothing."""
    return []


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """It is there already."""
