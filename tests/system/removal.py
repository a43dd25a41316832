# SPDX-License-Identifier: Apache-2.0
"""What must hold when a block device is removed while it is served, whatever way it goes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

import pytest

from stasis.errors import ExitCode
from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.helpers import MIB, wait_until

EXPECTED = "was removed", "did not end in order", "died; starting it again"
"""What the logs say of it; for `expects_errors`."""


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == errno.EIO


def check_removal(stasis: Stasis, path: str, remove: Callable[[], None], *options: str) -> str:
    """Attach `path` as "disk", take a snapshot, remove the device: errors that say so, nothing hangs or is left.

    Returns the generation of the change map, which must not be gone on with.
    """
    uri = stasis("device", "attach", path, "--name", "disk", *options)
    uuid = stasis("snapshot", "create", "--storage", "memory", "--limit", "64M", "disk", "--take")
    generation = stasis.json("map", "info", "disk")["generation"]
    with Client.connect(uri, timeout=60) as client:
        client.pwrite(0, b"x" * MIB)
        client.flush()
        remove()
        refused(lambda: client.pread(2 * MIB, 4096))
        refused(lambda: client.pwrite(2 * MIB, bytes(4096)))
        refused(lambda: client.write_zeroes(2 * MIB, 4096))
        refused(client.flush)
    wait_until(lambda: stasis.json("snapshot", "show", uuid)["state"] == "corrupted", "the end of the snapshot")
    assert stasis.json("snapshot", "show", uuid)["error_code"] == -errno.ENODEV
    wait_until(lambda: "broken" in stasis.json("map", "info", "disk")["assumed"], "the end of tracking")
    check_shown(stasis, path)
    check_death_of_worker(stasis)
    stasis("device", "detach", "disk")  # its image is lost anyway
    stasis("snapshot", "destroy", uuid)
    assert stasis.json("device", "list") == []
    assert stasis.json("map", "info", "disk")["generation"] == generation
    return str(generation)


def check_shown(stasis: Stasis, path: str) -> None:
    (shown,) = stasis.json("device", "list")
    assert shown["state"] == "failed"
    assert shown["error"] == f"the block device {path} of disk was removed"
    message = stasis.fail(
        ExitCode.NOT_FOUND, "snapshot", "create", "--storage", "memory", "--limit", "64M", "disk", "--take"
    )
    assert "disk" in message


def check_death_of_worker(stasis: Stasis) -> None:
    """A worker of a removed device is not started again, and that does not keep the daemon busy."""
    pid = int(stasis.json("device", "show", "disk")["pid"])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: stasis.json("device", "show", "disk").get("pid") is None, "the worker's end")
    assert stasis.json("device", "show", "disk")["state"] == "failed"
