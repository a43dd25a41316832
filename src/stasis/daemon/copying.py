# SPDX-License-Identifier: Apache-2.0
"""`snapshot copy`: what the daemon knows of an image, put together with the copy job, which runs in the caller."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.block.copy import CopyIdentity, CopyOptions, CopyResult, Progress, copy_image

if TYPE_CHECKING:
    from stasis.daemon.client import Client

__all__ = ["copy"]


def copy(client: Client, snapshot: str, device: str, target: str | os.PathLike[str], since: int | None,
         generation: str | None, options: CopyOptions | None, progress: Progress | None) -> CopyResult:
    """Copy one image; see `Client.copy`."""
    shown = client.snapshot(snapshot)
    member = client.require_device(shown, device)
    changed = None
    if since is not None:
        extents = client.changed_extents(device, since, held=True, generation=generation or member.generation)
        changed = [(extent.offset, extent.length) for extent in extents]
    chosen = replace(options or CopyOptions(), block_size=client.map_info(device).block_size,
                     never=Path(member.path), expected_generation=generation)
    identity = CopyIdentity(snapshot=shown.id, device=device, generation=member.generation or "",
                            change_number=member.change_number or 0, since=since)
    return copy_image(str(member.uri), target, identity, changed=changed, options=chosen, progress=progress)
