# SPDX-License-Identifier: Apache-2.0
"""The out-of-tree modules of Veeam Agent 7: filters through a node of their own, everything else as in `v7`."""

from __future__ import annotations

from ctypes import Structure, c_char, c_uint32, c_uint64

from stasis.blksnap.uapi.common import BLKFILTER_NAME_LENGTH, BLKSNAP
from stasis.blksnap.uapi.v5 import SnapshotAppendStorage
from stasis.linux.ioctl import IOR, IOW, IOWR

__all__ = [
    "BDEVFILTER_ATTACH",
    "BDEVFILTER_CTL",
    "BDEVFILTER_DETACH",
    "CONTROL_NODE",
    "IOCTL_BLKSNAP_MOD",
    "IOCTL_BLKSNAP_SETLOG",
    "IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE",
    "BdevFilterCtl",
    "BdevFilterName",
]

CONTROL_NODE = "veeamblksnap"
BDEVFILTER = "F"


class BdevFilterName(Structure):
    """struct bdevfilter_name: the address of the device's path, and the filter's name."""

    _fields_ = [("devpath", c_uint64), ("name", c_char * BLKFILTER_NAME_LENGTH)]


class BdevFilterCtl(Structure):
    """struct bdevfilter_ctl."""

    _fields_ = [
        ("devpath", c_uint64),
        ("name", c_char * BLKFILTER_NAME_LENGTH),
        ("cmd", c_uint32),
        ("optlen", c_uint32),
        ("opt", c_uint64),
    ]


BDEVFILTER_ATTACH = IOWR(BDEVFILTER, 140, BdevFilterName)
BDEVFILTER_DETACH = IOWR(BDEVFILTER, 141, BdevFilterName)
BDEVFILTER_CTL = IOWR(BDEVFILTER, 142, BdevFilterCtl)

IOCTL_BLKSNAP_MOD = IOR(BLKSNAP, 32, 40)
IOCTL_BLKSNAP_SETLOG = IOW(BLKSNAP, 33, 24)
IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE = IOW(BLKSNAP, 34, SnapshotAppendStorage)
