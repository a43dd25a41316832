# SPDX-License-Identifier: Apache-2.0
"""Unmounting where tests run side by side: a mount namespace that another one makes holds our mounts for a while."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from stasis.linux import mounts
from tests.system.helpers import wait_until

__all__ = ["unmount"]


def unmount(mount: Path) -> None:
    """And wait for the file system's end: other programs look at mounts, and a mount namespace that somebody made
    meanwhile keeps it alive."""
    node = next(one.source for one in mounts.mounts() if one.target == os.path.realpath(mount))
    command = ["umount", str(mount)]
    wait_until(lambda: not subprocess.run(command, capture_output=True).returncode, f"unmounting {mount}")
    if node not in (one.source for one in mounts.mounts()):  # it may be mounted here as well, at another place
        wait_until(lambda: _is_free(node), f"the end of the file system on {node}")


def _is_free(node: str) -> bool:
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
    return True
