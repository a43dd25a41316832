# SPDX-License-Identifier: Apache-2.0
"""Pid namespaces (pid_namespaces(7)) of which a tree's first process is the first one. Nothing is in them but
processes: the worker that dumps is inside, and the restore begins in a new one (`restore/container.py`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stasis.linux import process, procfs
from stasis.process.helpers import helpers

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "write"]


def check(root: int, findings: Findings) -> None:
    """Note processes that came in from outside: they are not in the tree, and end with its first process. One may be
    what is left for a moment of a dumper that was killed."""
    if root != 1:
        findings.add(root, "pid namespace", "it is not the first process of its own pid namespace")
        return
    known = {*_below(root), *_below(os.getpid()), *helpers()}
    for pid in process.processes():
        if pid not in known and _lives(pid):
            reason = f"{process.name(pid)} has entered it and is not in the tree"
            findings.add(pid, "pid namespace", reason, passes=True)


def _lives(pid: int) -> bool:
    try:
        return procfs.stat(pid).state not in "ZX"
    except ProcessLookupError:
        return False


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
