# SPDX-License-Identifier: Apache-2.0
"""A worker without a daemon, to compare change tracking with none: users cannot turn it off."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from lab import Lab
from peers import nbd_uri

from stasis.block.opening import open_origin
from stasis.block.settings import Settings
from stasis.daemon.child import spawn
from stasis.daemon.sockets import listen_unix

__all__ = ["start_worker"]


def start_worker(lab: Lab, path: Path, *, tracking: bool, buffered: bool) -> str:
    """Serve an origin by a worker of its own until the scope ends; the URI."""
    name = uuid.uuid4().hex[:8]
    state = lab.directory / name
    state.mkdir()
    origin = open_origin(str(path), buffered=buffered)
    lab.on_exit(origin.close)
    listener = listen_unix(lab.path(f"{name}.sock"))
    lab.on_exit(listener.close)
    second = origin.buffered_fd if origin.buffered_fd != origin.fd else None
    configuration = {
        "name": "disk",
        "path": str(path),
        "origin_fd": origin.fd,
        "buffered_fd": second,
        "listen_fd": listener.fileno(),
        "control_path": str(lab.path(f"{name}.ctl")),
        "inner_path": str(lab.path(f"{name}.in")),
        "map_path": str(state / "map"),
        "settings": Settings().as_dict(),
        "tracking": tracking,
    }
    lent = [origin.fd, listener.fileno(), *([second] if second is not None else [])]
    child = spawn("stasis.block.worker", configuration, lent, Path(os.devnull))
    lab.on_exit(child.close)
    lab.on_exit(lambda: child.stop(10.0))
    return nbd_uri(lab.directory / f"{name}.sock", "disk")
