# SPDX-License-Identifier: Apache-2.0
"""stasis keeps the state of a running Linux machine: snapshots of block devices while they are written.

Everything the command line can do is a call of `stasis.Client`, which `stasis.connect` makes:

    import stasis

    with stasis.connect() as client:
        disk = client.attach("disk.img")
        snapshot = client.create_snapshot("/var/tmp", [disk.name], limit=1 << 30, take=True)
        client.copy(snapshot.id, disk.name, "backup.img")
        client.destroy(snapshot.id)
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing would take half of what a short command needs to load
if TYPE_CHECKING:
    from typing import Any

    from stasis.daemon.client import Client, connect
    from stasis.daemon.model import Device, Event, Extent, MapInfo, Snapshot, SnapshotDevice, Status, Storage
    from stasis.errors import (
        BusyError,
        DaemonError,
        ExitCode,
        GenerationError,
        NotFoundError,
        PermissionDeniedError,
        StasisError,
        StateError,
        StorageError,
        UnsupportedError,
        UsageError,
        VerifyError,
    )

__version__ = "0.1.0"

_HOMES = {
    "stasis.daemon.client": ("Client", "connect"),
    "stasis.daemon.model": ("Device", "Event", "Extent", "MapInfo", "Snapshot", "SnapshotDevice", "Status", "Storage"),
    "stasis.errors": (
        "BusyError",
        "DaemonError",
        "ExitCode",
        "GenerationError",
        "NotFoundError",
        "PermissionDeniedError",
        "StasisError",
        "StateError",
        "StorageError",
        "UnsupportedError",
        "UsageError",
        "VerifyError",
    ),
}

__all__ = [
    "BusyError",
    "Client",
    "DaemonError",
    "Device",
    "Event",
    "ExitCode",
    "Extent",
    "GenerationError",
    "MapInfo",
    "NotFoundError",
    "PermissionDeniedError",
    "Snapshot",
    "SnapshotDevice",
    "StasisError",
    "StateError",
    "Status",
    "Storage",
    "StorageError",
    "UnsupportedError",
    "UsageError",
    "VerifyError",
    "__version__",
    "connect",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: a worker that imports the package does not pay for the client."""
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'stasis' has no attribute {name!r}")
