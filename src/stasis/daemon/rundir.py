# SPDX-License-Identifier: Apache-2.0
"""Which run directory is meant, and its NBD sockets: the part of `paths` that costs nothing to load."""

from __future__ import annotations

import os

__all__ = ["default", "nbd_socket", "resolve"]


def default() -> str:
    """/run/stasis for root; else below XDG_RUNTIME_DIR, or in /tmp where a login session gave none."""
    if os.geteuid() == 0:
        return "/run/stasis"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"{runtime}/stasis" if runtime else f"/tmp/stasis-{os.geteuid()}"


def resolve(given: str | os.PathLike[str] | None = None) -> str:
    """The absolute path of the run directory: what was given, then STASIS_RUN_DIR, then the default."""
    return os.path.abspath(given or os.environ.get("STASIS_RUN_DIR") or default())


def nbd_socket(run: str, export: str) -> str:
    """Where the export of a device or image is served."""
    return os.path.join(run, "nbd", f"{export}.sock")
