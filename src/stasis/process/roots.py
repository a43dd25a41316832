# SPDX-License-Identifier: Apache-2.0
"""How a dumper reaches files by the paths that the kernel tells: those of the tree's mount namespace.

A tree that lives in the dumper's own one has the dumper's paths, also where its processes have another root directory.
For one with its own an anchor, a helper process, has gone into that namespace and stands at its root.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from stasis.linux import process
from stasis.linux.namespaces import CLONE_NEWNS, join
from stasis.process.helpers import fork_helper, wait_for_helper

__all__ = ["anchor", "anchored", "reach"]

_anchors: list[int] = []


def reach(path: str) -> str:
    """Where a path of the tree's mount namespace is for us."""
    return f"/proc/{_anchors[-1]}/root{path}" if _anchors else path


def anchor() -> int:
    """The process at the root of the tree's mount namespace; 0 where that is ours."""
    return _anchors[-1] if _anchors else 0


@contextmanager
def anchored(pid: int) -> Iterator[None]:
    """Have an anchor in the mount namespace of a process, which ends with us."""
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
        if not os.read(reader, 1):
            raise PermissionError(1, "the mount namespace cannot be entered", str(pid))
        _anchors.append(child)
        yield
    finally:
        os.close(reader)
        if child in _anchors:
            _anchors.remove(child)
        os.kill(child, signal.SIGKILL)
        wait_for_helper(child)
