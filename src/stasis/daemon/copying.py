# SPDX-License-Identifier: Apache-2.0
"""`snapshot copy`: what the daemon knows of an image, put together with the copy job, which runs in the caller."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.block.copy import CopyIdentity, CopyOptions, CopyResult, Progress, copy_image
from stasis.block.copy.sidecar import SIDECAR_SUFFIX
from stasis.errors import DaemonError, NotFoundError, StorageError

if TYPE_CHECKING:
    from stasis.daemon.client import Client

__all__ = ["copy"]


def copy(client: Client, snapshot: str, device: str, target: str | os.PathLike[str], since: int | None,
         generation: str | None, options: CopyOptions | None, progress: Progress | None) -> CopyResult:
    """Copy one image; see `Client.copy`."""
    shown = client.snapshot(snapshot)
    member = client.require_device(shown, device)
    _refuse_lost(client, shown.id, device, target)
    changed = None
    if since is not None:
        extents = client.changed_extents(device, since, held=True, generation=generation or member.generation)
        changed = [(extent.offset, extent.length) for extent in extents]
    chosen = replace(options or CopyOptions(), block_size=client.map_info(device).block_size,
                     never=Path(member.path), expected_generation=generation)
    identity = CopyIdentity(snapshot=shown.id, device=device, generation=member.generation or "",
                            change_number=member.change_number or 0, since=since)
    try:
        return copy_image(str(member.uri), target, identity, changed=changed, options=chosen, progress=progress)
    except StorageError:
        _refuse_lost(client, shown.id, device, target)
        raise


def _refuse_lost(client: Client, snapshot: str, device: str, target: str | os.PathLike[str]) -> None:
    """Raise StorageError if the image is lost: then no copy of it can be begun or finished, however often tried."""
    code = _error_code(client, snapshot, device)
    if not code:
        return
    advice = "take a new snapshot"
    if code == -errno.ENOSPC:
        advice += " with a larger --limit or storage"
    record = f"{os.fspath(target)}{SIDECAR_SUFFIX}"
    advice += f", remove {record} and copy the whole image" if os.path.exists(record) else " and copy that"
    raise StorageError(f"the image of {device} in the snapshot {snapshot} is lost: {os.strerror(-code)}",
                       hint=advice, errno=errno.EIO)


def _error_code(client: Client, snapshot: str, device: str) -> int:
    """The negative errno that ended the image, or 0. The worker knows of it a moment before the daemon does."""
    if code := client.snapshot(snapshot).device(device).error_code:
        return code
    with contextlib.suppress(NotFoundError, DaemonError):
        held = (client.device(device).worker or {}).get("snapshot") or {}
        if held.get("id") == snapshot:
            return int(held["error_code"])
    return 0
