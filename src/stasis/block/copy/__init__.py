# SPDX-License-Identifier: Apache-2.0
"""Copying a snapshot image to a file or a block device.

The whole image, sparse, or only what changed since an earlier change number; resumable, verified on request.
It is a client of the image's NBD export and needs nothing else, so it runs wherever the socket can be
reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stasis.block.copy.job import CopyOptions, CopyResult, Progress, copy_image
    from stasis.block.copy.sidecar import CopyIdentity

__all__ = ["CopyIdentity", "CopyOptions", "CopyResult", "Progress", "copy_image"]


def __getattr__(name: str) -> Any:
    """Load the job when it is first used: backups take the arithmetic and the threads of this package, and start
    70 ms earlier without the rest."""
    if name not in __all__:
        raise AttributeError(f"module 'stasis.block.copy' has no attribute {name!r}")
    from stasis.block.copy import job, sidecar

    return getattr(sidecar if name == "CopyIdentity" else job, name)
