# SPDX-License-Identifier: Apache-2.0
"""blksnap v6 and v7, and stable-v2.0: the control node of today under filter requests that are two numbers lower.

BLKFILTER_CTL here has the number of BLKFILTER_ATTACH in `current`, for a structure of the same size: whoever calls must
know the generation. SNAPSHOT_CREATE has the number of today's in v6 too, with a descriptor in place of the path.
"""

from __future__ import annotations

from ctypes import Structure, c_uint32, c_uint64

from stasis.blksnap.uapi.common import FILTER, FilterCtl, FilterName, Uuid
from stasis.linux.ioctl import IOWR

__all__ = ["BLKFILTER_ATTACH", "BLKFILTER_CTL", "BLKFILTER_DETACH", "EVENT_CORRUPTED", "SnapshotCreateV6"]

BLKFILTER_ATTACH = IOWR(FILTER, 140, FilterName)
BLKFILTER_DETACH = IOWR(FILTER, 141, FilterName)
BLKFILTER_CTL = IOWR(FILTER, 142, FilterCtl)

EVENT_CORRUPTED = 0
"""The only event."""


class SnapshotCreateV6(Structure):
    """struct blksnap_snapshot_create of v6: limit in sectors, an open descriptor; the module fills in the id."""

    _fields_ = [("diff_storage_limit_sect", c_uint64), ("diff_storage_fd", c_uint32), ("id", Uuid)]
