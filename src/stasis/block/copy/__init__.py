# SPDX-License-Identifier: Apache-2.0
"""Copying a snapshot image to a file or a block device.

The whole image, sparse, or only what changed since an earlier change number; resumable, verified on request.
It is a client of the image's NBD export and needs nothing else, so it runs wherever the socket can be
reached.
"""

from stasis.block.copy.job import CopyOptions, CopyResult, Progress, copy_image
from stasis.block.copy.sidecar import CopyIdentity

__all__ = ["CopyIdentity", "CopyOptions", "CopyResult", "Progress", "copy_image"]
